"""Where tensors live and how precisely they are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch

from components.exceptions import ConfigError
from components.settings import Settings


def choose_device(settings: Settings) -> str:
    """`cuda` where the settings allow it and there is one, else `cpu`."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (on CPUs: AVX512-BF16 or AMX)."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())  # no public name in torch 2.13


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


def _prepare_torch(settings: Settings) -> torch.device:
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "setting URM_DEVICE", expected="a CUDA device", got="none on this machine", remedy="set it to cpu or auto"
        )
    use_cuda = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")
