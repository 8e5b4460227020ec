import pytest
import torch

from components.exceptions import ConfigError
from components.urm.training.loss import recall_loss, text_loss
from components.urm.training.shares import Shares, take_share
from components.urm.training.steps import NegativeSampler, TrainingSteps
from tests.worlds.urm import keep_examples

TEXT_WEIGHT = 0.3


@pytest.fixture
def steps(tables, config, new_model):
    # Contexts ask one task, two or three: no split into halves has equal numbers of examples.
    fewer = keep_examples(tables, config, lambda context, place: place < 1 + context % 3)
    spoken = config.model_copy(update={"urm": config.urm.model_copy(update={"text_loss_weight": TEXT_WEIGHT})})
    return TrainingSteps(fewer, new_model.builder, NegativeSampler(tables.catalogue, 16, 0.75), spoken)


def losses(model, batch):
    output = model._forward(batch)
    return recall_loss(output, batch, "max"), text_loss(output.text_logits, batch["labels"])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def unequal(steps):
    """A step whose text and examples are not spread evenly."""
    for step in range(len(steps)):
        batch = steps[step]
        if len(batch["labels"]) and len({int(n) for n in batch["block_rows"].bincount()}) > 1:
            return batch
    raise LookupError("no step with text and unequal contexts")


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_gradients_of_the_shares_average_to_those_of_the_whole_batch(steps, new_model, processes):
    batch, model = unequal(steps), new_model.model
    recall, text = losses(model, batch)
    expected = gradients(model, recall + TEXT_WEIGHT * text)
    average = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    for process in range(processes):
        share = take_share(batch, process, processes)
        recall, text = losses(model, share)
        loss = share["recall_share"] * recall + TEXT_WEIGHT * share["text_share"] * text
        for name, gradient in gradients(model, loss).items():
            average[name] += gradient / processes
    for name, gradient in expected.items():
        torch.testing.assert_close(
            average[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: name + text
        )


def test_a_plain_mean_of_unequal_shares_would_be_another_gradient(steps, new_model):
    batch, model = unequal(steps), new_model.model
    expected = gradients(model, losses(model, batch)[0])
    halves = [gradients(model, losses(model, take_share(batch, process, 2))[0]) for process in range(2)]
    name = "user_head.project.weight"
    assert not torch.allclose((halves[0][name] + halves[1][name]) / 2, expected[name], atol=1e-5, rtol=1e-3)


def test_shares_keep_every_field_and_every_example_once(steps):
    batch = steps[0]
    parts = [Shares(steps, process, 3)[0] for process in range(3)]
    assert len(Shares(steps, 0, 3)) == len(steps)
    for part in parts:
        assert part.keys() == batch.keys()
    for name in ("targets", "accidental", "token_ids", "labels", "queries"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert float(sum(part["recall_share"] for part in parts)) == pytest.approx(3)


def test_more_processes_than_contexts_are_refused(steps):
    with pytest.raises(ConfigError, match=r"urm\.contexts_per_batch: expected at least 5, one per process, got 4"):
        Shares(steps, 0, 5)[0]
