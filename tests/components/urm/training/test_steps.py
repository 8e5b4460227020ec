import itertools
import math
from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from components.exceptions import DataError
from components.schemas.examples import map_rows
from components.urm.data.examples import Groups
from components.urm.training.schedule import FLOOR, Budget
from components.urm.training.steps import NegativeSampler, TrainingSteps
from tests.worlds.urm import keep_examples


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


def read_in_memory(contexts, examples, tasks):
    """The oracle: all examples of training as Python objects, by context, in the order of the tables."""
    known = {row["context_id"]: row for row in contexts.to_pylist()}
    groups = {}
    for row in examples.to_pylist():
        if row["split"] == "train":
            asked = groups.setdefault(row["context_id"], [])
            asked.append((tasks[row["task"]], row["query"], row["target_item_ids"], tuple(row["target_categories"])))
    return [(known[key], asked) for key, asked in groups.items()]


def test_memory_mapped_groups_are_those_of_the_tables(tables, config, tmp_path):
    tasks = {task.name: task for task in config.tasks}
    order = np.random.default_rng(0).permutation(len(tables.examples))
    examples = tables.examples.take(order)  # those of a context stand apart, among those of other splits
    mapped = []
    for name, table in (("contexts", tables.contexts), ("examples", examples)):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
        mapped.append(map_rows(tmp_path / f"{name}.parquet", pc.field("split") == "train", tmp_path))
        assert mapped[-1].column(0).num_chunks > 1
    groups, expected = Groups(*mapped, tasks, "train"), read_in_memory(tables.contexts, examples, tasks)
    assert [len(asked) for _, asked in expected] == groups.num_examples.tolist()
    assert [len(row["history_item_ids"]) for row, _ in expected] == groups.history_lengths.tolist()
    assert groups.count_tasks() == Counter(task.name for _, asked in expected for task, *_ in asked)
    assert groups.behaviors() == sorted({name for row, _ in expected for name in row["history_behaviors"]})
    for (context, asked), (row, wanted) in zip(groups, expected, strict=True):
        lists = (context.item_ids, context.counts, context.days_since, context.behaviors)
        names = ("item_ids", "counts", "days_since", "behaviors")
        assert [values.tolist() for values in lists] == [row[f"history_{name}"] for name in names]
        for name in ("num_events", "num_items", "num_active_days", "days_since_last"):
            assert getattr(context, name) == row[name]
        assert context.top_categories == tuple(row["top_categories"])
        found = [(e.request.task, e.request.query, e.targets.tolist(), e.categories) for e in asked]
        assert found == wanted


def test_an_example_of_an_unknown_context_is_refused(tables, config):
    tasks = {task.name: task for task in config.tasks}
    with pytest.raises(DataError, match=r"example 3: expected a known context, got 1; run"):
        Groups(tables.contexts.filter(pc.field("context_id") != 1), tables.examples, tasks, "train")


def test_an_example_of_an_unknown_task_is_refused(tables, config):
    with pytest.raises(DataError, match="expected a task of the run"):
        Groups(tables.contexts, tables.examples, {"next_purchase": config.tasks[0]}, "train")


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


def test_text_has_a_weight_in_the_steps_that_have_it(new_model, tables, groups, config):
    spoken = config.model_copy(update={"urm": config.urm.model_copy(update={"text_loss_weight": 0.3, "max_steps": 40})})
    steps = TrainingSteps(groups, new_model.builder, NegativeSampler(tables.catalogue, 8, 0.75), spoken)
    batches = [steps[step] for step in range(40)]
    assert {float(batch["text_share"]) for batch in batches} == {0.0, 1.0}
    for batch in batches:
        assert float(batch["text_share"]) == (len(batch["labels"]) > 0)


def test_rare_tasks_are_trained_more_often_than_they_occur(new_model, tables, config):
    few = config.model_copy(update={"urm": config.urm.model_copy(update={"tasks_per_context": 1})})
    rare = keep_examples(tables, config, lambda context, place: context < 4 or place < 2)
    sampler = NegativeSampler(tables.catalogue, 8, 0.75)
    steps = TrainingSteps(rare, new_model.builder, sampler, few)
    rng = np.random.default_rng(0)
    _, asked = rare[0]
    chosen = [steps._choose(asked, rng) for _ in range(600)]
    assert all(len(examples) == 1 for examples in chosen)
    shares = [np.mean([examples[0] is one for examples in chosen]) for one in asked]
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
