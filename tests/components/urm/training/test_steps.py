import itertools
import math

import numpy as np
import pytest
import torch

from components.exceptions import DataError
from components.urm.data.examples import read_examples
from components.urm.training.schedule import FLOOR, Budget
from components.urm.training.steps import NegativeSampler, TrainingSteps


def flat(batch, prefix=""):
    for name, value in batch.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_examples_of_a_context_share_one_object(groups):
    assert len(groups) == 16
    for context, examples in groups:
        assert [example.request.task.name for example in examples] == ["next_purchase", "new_item", "text_query"]
        assert all(example.request.context is context for example in examples)


def test_an_example_of_an_unknown_task_is_refused(tables, config):
    with pytest.raises(DataError, match="expected a task of the run"):
        read_examples(tables.contexts, tables.examples, {"next_purchase": config.tasks[0]}, "train")


def test_a_step_depends_on_seed_and_number_alone(steps):
    first, again, other = (dict(flat(steps[number])) for number in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["negatives"], other["negatives"])


def test_targets_and_negatives_point_at_their_items(steps, new_model, tables, groups):
    batch = steps[0]
    places = steps._places(0)
    vectors = batch["items"]["vectors"]["text"]
    row = 0
    for place in places:
        for example in groups[place][1]:
            targets = batch["targets"][row][batch["target_mask"][row]]
            expected, _ = new_model.builder.reader.table.gather("text", example.targets)
            np.testing.assert_array_equal(vectors[targets].numpy(), expected)
            texts = torch.from_numpy(expected)  # no two items have one vector
            hits = (vectors[batch["negatives"]][:, None] == texts[None]).all(-1).any(-1)
            assert torch.equal(batch["accidental"][row], hits)
            row += 1
    assert row == len(batch["block_rows"]) == 12


def test_an_epoch_visits_every_context_once(steps):
    places = [steps._places(step) for step in range(4)]
    assert sorted(np.concatenate(places).tolist()) == list(range(16))
    assert len(steps._epoch(0)) == 4
    assert steps._places(4).tolist() != places[0].tolist()


def test_rare_tasks_are_trained_more_often_than_they_occur(groups, new_model, tables, config):
    few = config.model_copy(update={"urm": config.urm.model_copy(update={"tasks_per_context": 1})})
    rare = [(context, examples if number < 4 else examples[:2]) for number, (context, examples) in enumerate(groups)]
    sampler = NegativeSampler(tables.catalogue, 8, 0.75)
    steps = TrainingSteps(rare, new_model.builder, sampler, few)
    rng = np.random.default_rng(0)
    chosen = [steps._choose(rare[0][1], rng) for _ in range(600)]
    assert all(len(examples) == 1 for examples in chosen)
    shares = [np.mean([examples[0] is one for examples in chosen]) for one in rare[0][1]]
    # 16, 16 and 4 examples: weights 1/4, 1/4, 1/2
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.06)


def test_negatives_follow_frequency_to_a_power(tables):
    sampler = NegativeSampler(tables.catalogue, 200_000, 0.75)
    items, log_expected = sampler.draw(np.random.default_rng(0))
    weights = np.arange(60, 0, -1) ** 0.75
    counts = np.bincount(items - 1000, minlength=60)
    np.testing.assert_allclose(counts, 200_000 * weights / weights.sum(), rtol=0.15)
    first = log_expected[items == 1000][0]
    assert first == pytest.approx(math.log(200_000 * weights[0] / weights.sum()), rel=1e-5)


def test_rate_warms_up_and_falls_to_the_floor():
    budget = Budget(max_steps=100, max_seconds=1e6)
    rates = [budget.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 5)
    assert max(rates) == rates[4]
    assert rates[100] == pytest.approx(FLOOR, abs=1e-3)
    assert all(later <= sooner + 1e-9 for sooner, later in itertools.pairwise(rates[4:]))
