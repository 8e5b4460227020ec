"""Where tensors live, how many threads multiply them, and how precisely."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import joblib
import torch

from components.exceptions import ConfigError
from components.settings import Settings


def prepare_device(settings: Settings) -> str:
    """Set the threads of this process and choose its device: see `set_threads` and `choose_device`."""
    set_threads(settings)
    return choose_device(settings)


def choose_device(settings: Settings) -> str:
    """`cuda` where the settings allow it and there is one, else `cpu`.

    Raises:
        ConfigError: The settings demand CUDA and there is none.
    """
    found = torch.cuda.is_available()
    if settings.device == "cuda" and not found:
        raise ConfigError(
            "setting URM_DEVICE",
            expected="a CUDA device",
            got="none on this machine",
            remedy="use an image and a node with CUDA, or set it to cpu or auto",
        )
    return "cuda" if found and settings.device != "cpu" else "cpu"


def set_threads(settings: Settings) -> None:
    """Limit the threads of matrix work: those of torch, and of faiss where it is imported already.

    Without `num_threads` they are no more than the cores that a container may use, which torch does not know.
    """
    threads = settings.num_threads or min(torch.get_num_threads(), joblib.cpu_count())
    torch.set_num_threads(threads)
    if faiss := sys.modules.get("faiss"):
        faiss.omp_set_num_threads(threads)


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (on CPUs: AVX512-BF16 or AMX).

    Emulation, which a GPU before Ampere has, is slower than float32.
    """
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def mixed_precision(device: str) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where the hardware has it."""
    kind = device.split(":")[0]
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def full_precision(device: str) -> AbstractContextManager[object]:
    """No autocast: for inner products over the catalogue, where eight bits cannot rank."""
    return torch.autocast(device.split(":")[0], enabled=False)


BatchT = TypeVar("BatchT", bound=Mapping[str, Any])


def to_device(batch: BatchT, device: torch.device) -> BatchT:
    """The batch with its tensors, nested ones too, on a device."""
    moved = {
        name: to_device(value, device) if isinstance(value, Mapping) else value.to(device)
        for name, value in batch.items()
    }
    return cast(BatchT, moved)
