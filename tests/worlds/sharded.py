"""One process of a model sharded by FSDP2 over several; prints how far it is from the whole model."""

import json
from pathlib import Path

import torch
import torch.distributed
from torch.distributed.tensor import DTensor

from components.urm.data.batch import TrainingBatch
from components.urm.inference import UrmRecaller
from components.urm.network.model import Urm
from components.urm.training.loss import recall_loss, text_loss
from components.urm.training.sharding import gather_weights, shard_model
from components.urm.training.shares import take_share
from tests.worlds.training import build_untrained


def loss_of(model: Urm, batch: TrainingBatch) -> torch.Tensor:
    """The loss that the trainer takes of a share or of a whole batch."""
    output = model(batch)
    recall, text = recall_loss(output, batch, "max"), text_loss(output.text_logits, batch["labels"])
    return recall * batch["recall_share"] + 0.3 * text * batch["text_share"]


def main(world: str, batch_file: str) -> None:
    """Compare gradients, item vectors and gathered weights."""
    torch.distributed.init_process_group("gloo")
    batch: TrainingBatch = torch.load(batch_file, weights_only=True)
    whole, new = build_untrained(Path(world)).model, build_untrained(Path(world))
    expected = loss_of(whole, batch)
    expected.backward()

    sharded = new.model
    shard_model(sharded, torch.device("cpu"))
    process, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loss_of(sharded, take_share(batch, process, processes)).backward()

    gradients = {name: weight.grad for name, weight in whole.named_parameters()}
    compared, worst = 0, 0.0
    for name, weight in sharded.named_parameters():
        if isinstance(weight.grad, DTensor):
            difference = (weight.grad.full_tensor() - gradients[name]).norm() / (gradients[name].norm() + 1e-6)
            compared, worst = compared + 1, max(worst, float(difference))
    items = torch.arange(1000, 1060).numpy()
    vectors = [UrmRecaller(model.eval(), new.builder, "max").encode_items(items) for model in (whole, sharded)]
    gathered = gather_weights(sharded)
    weights = whole.state_dict() if process == 0 else {}  # the first process alone gets the gathered ones
    figures = {"compared": compared, "gradients": worst, "items": float(abs(vectors[0] - vectors[1]).max())}
    alike = all(torch.equal(gathered[name], weight) for name, weight in weights.items() if name in gathered)
    print(json.dumps(figures | {"gathered": gathered.keys() == weights.keys() and alike}))
    torch.distributed.destroy_process_group()
