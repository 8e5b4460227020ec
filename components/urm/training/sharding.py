"""A model split over the processes (FSDP2), and its checkpoints, which the processes write and read together by URI.

Each process writes its own shards through fsspec, so that processes on different machines share nothing but the URI.
"""

from typing import Any

import structlog
import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter  # public in no other module
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from components.addresses import is_local
from components.urm.network.model import Urm

log = structlog.get_logger()


def shard_model(model: Urm, device: torch.device) -> None:
    """Split the weights in place: a unit per layer of the backbone, and one for the rest."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    model.to(device)
    layers: Any = () if model.backbone is None else model.backbone.base_model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "item_vectors")


def gather_weights(model: Urm) -> dict[str, torch.Tensor]:
    """All weights in the first process's memory; empty in the others."""
    weights: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(weights)


def save_shards(uri: str, model: Urm, optimizer: torch.optim.Optimizer) -> bool:
    """Write the shards of all processes to a folder; False in all of them if one fails."""
    try:
        save(_state(model, optimizer), storage_writer=FsspecWriter(_full(uri), sync_files=is_local(uri)))
    except CheckpointException as error:
        log.warning("shards cannot be saved", folder=uri, error=" ".join(str(error).split())[:500])
        return False
    return True


def load_shards(uri: str, model: Urm, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read what `save_shards` wrote, whatever the number of processes was; the weights alone without an optimizer."""
    state = _state(model, optimizer)
    load(state, storage_reader=FsspecReader(_full(uri)))
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))  # no tied output embedding
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _state(model: Urm, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    return state if optimizer is None else state | {"optimizer": get_optimizer_state_dict(model, optimizer)}


def _full(uri: str) -> str:
    return f"file://{uri}" if is_local(uri) and "://" not in uri else uri
