import math

import numpy as np
import pytest
import torch

from components.items.ramps import ramp_features
from components.urm.data.examples import Groups
from components.urm.network.heads import POPULARITY_RAMPS, Gains
from components.urm.training.popularity import begin_with_popularity, fit_popularity
from tests.worlds.urm import build_batch, keep_examples


def likelihood_gradient(log_counts, targets, weights):
    """Of one task: features that are wanted minus those that are given, and minus the pull of the prior [F]."""
    features = ramp_features(log_counts, 2).double()
    given = torch.softmax(features @ weights.double(), dim=0)
    wanted = torch.from_numpy(targets / targets.sum())
    return (wanted - given) @ features - weights.double() / targets.sum()


@pytest.fixture
def log_counts():
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.log1p(rng.geometric(0.05, (300, 2)).astype(np.float32)))


def test_nothing_explains_the_targets_better(log_counts):
    rng = np.random.default_rng(1)
    targets = rng.poisson(np.exp(log_counts.numpy().T))  # a task for each count
    weights = fit_popularity(log_counts, targets.astype(float), 2)
    for of_task, fitted in zip(targets, weights, strict=True):
        assert likelihood_gradient(log_counts, of_task, fitted).abs().max() < 2e-3
        assert likelihood_gradient(log_counts, of_task, torch.zeros_like(fitted)).abs().max() > 0.02
    own = [ramp_features(log_counts, 2) @ fitted for fitted in weights]
    for task, scores in enumerate(own):  # targets that follow one count are found by it
        by_count = [np.corrcoef(scores, log_counts[:, count])[0, 1] for count in range(2)]
        assert by_count[task] > 0.95 > abs(by_count[1 - task]) + 0.5


def test_items_of_equal_counts_count_as_often_as_they_are(log_counts):
    repeated = torch.cat([log_counts, log_counts[:40], log_counts[:40]])
    targets = np.random.default_rng(2).integers(0, 5, (1, len(repeated))).astype(float)
    fitted = fit_popularity(repeated, targets, 2)[0]
    assert likelihood_gradient(repeated, targets[0], fitted).abs().max() < 2e-3


def popularity_weights(new, batch):
    """What the user head weighs popularity with in each block [E, R]; all of its user vectors agree."""
    size = new.model.user_head.gain_groups[Gains._fields.index("popularity")]
    weights = new.model(batch).user_vectors[..., -size:]
    assert torch.allclose(weights, weights[:, :1].expand_as(weights), atol=1e-5)
    return weights[:, 0].detach()


def test_each_task_begins_with_its_own_weights(new_model, groups, steps, tables):
    new_model.model.centre_tasks(steps[0])
    begin_with_popularity(new_model.model, groups, new_model.builder, tables.item_ids)
    counts = groups.count_targets(tables.item_ids)
    log_counts = new_model.builder.reader.read(tables.item_ids)["popularity"]
    some = [groups[number] for number in range(4)]
    found = popularity_weights(new_model, build_batch(new_model, some))
    names = [example.request.task.name for _, examples in some for example in examples]
    fitted = {name: fit_popularity(log_counts, counts[name][None], POPULARITY_RAMPS)[0] for name in names}
    assert not torch.allclose(fitted["new_item"], fitted["next_purchase"], atol=0.01)
    for name, wanted in fitted.items():
        mine = found[[place for place, other in enumerate(names) if other == name]].mean(dim=0)
        assert torch.allclose(mine, wanted, atol=1e-3), name


def test_tasks_with_one_prompt_begin_alike(new_model, steps, tables, config):
    new_model.model.centre_tasks(steps[0])
    search = next(task.prompt for task in config.tasks if task.name == "text_query")
    tasks = [task.model_copy(update={"prompt": search}) if task.name == "new_item" else task for task in config.tasks]
    groups = Groups(tables.contexts, tables.examples, {task.name: task for task in tasks}, "train")
    begin_with_popularity(new_model.model, groups, new_model.builder, tables.item_ids)
    counts = groups.count_targets(tables.item_ids)
    log_counts = new_model.builder.reader.read(tables.item_ids)["popularity"]
    wanted = fit_popularity(log_counts, (counts["text_query"] + counts["new_item"])[None], POPULARITY_RAMPS)[0]
    some = [groups[number] for number in range(4)]
    found = popularity_weights(new_model, build_batch(new_model, some))
    names = [example.request.task.name for _, examples in some for example in examples]
    rows = [place for place, name in enumerate(names) if name != "next_purchase"]
    assert torch.allclose(found[rows].mean(dim=0), wanted, atol=1e-3)
    assert torch.allclose(found[rows], wanted.expand(len(rows), -1), atol=0.1)  # whatever the query


def test_tasks_that_the_model_cannot_tell_apart_begin_with_their_mean(new_model, steps):
    """Two templates may render to one text, of which the states differ by rounding alone."""
    new_model.model.centre_tasks(steps[0])
    head, random = new_model.model.user_head, torch.Generator().manual_seed(0)
    states = torch.randn(3, head.task_centre.shape[-1], generator=random)
    states[1] = states[0] + 1e-4 * torch.randn(states.shape[1], generator=random)
    rows = head.gain_rows("popularity")
    weights = torch.randn(3, rows.stop - rows.start, generator=random)
    head.begin_with_popularity(states, torch.arange(3), weights)
    read = head.task_norm(states - head.task_centre) / math.sqrt(states.shape[1])
    found = (head.gains.bias[rows] + read @ head.gains.weight[rows, states.shape[1] :].T) * head.scales[rows]
    wanted = torch.stack([weights[:2].mean(dim=0)] * 2 + [weights[2]])
    assert torch.allclose(found, wanted, atol=0.1)
    assert head.gains.weight[rows].abs().max() < 20 * weights.abs().max()


def test_a_task_without_a_known_target_begins_with_the_mean_of_the_others(new_model, steps, tables, config):
    new_model.model.centre_tasks(steps[0])
    first = keep_examples(tables, config, lambda context, place: place == 0)
    begin_with_popularity(new_model.model, first, new_model.builder, tables.item_ids)
    log_counts = new_model.builder.reader.read(tables.item_ids)["popularity"]
    wanted = fit_popularity(log_counts, first.count_targets(tables.item_ids)["next_purchase"][None], POPULARITY_RAMPS)[
        0
    ]
    others = keep_examples(tables, config, lambda context, place: place > 0)
    found = popularity_weights(new_model, build_batch(new_model, [others[0]]))
    assert torch.allclose(found, wanted.expand_as(found), atol=1e-3)
    nothing = new_model.model.user_head.gains.bias.clone()
    begin_with_popularity(new_model.model, first, new_model.builder, np.array([1, 2]))  # a catalogue without targets
    assert torch.equal(nothing, new_model.model.user_head.gains.bias)


def test_targets_are_counted_by_task_and_once_per_example(groups, tables):
    for chosen in (tables.item_ids, tables.item_ids[::-7]):  # in any order
        expected = {}
        for _, examples in groups:
            for example in examples:
                of_task = expected.setdefault(example.request.task.name, np.zeros(len(chosen)))
                for target in example.targets:
                    of_task += (chosen == target) / len(example.targets)
        counted = groups.count_targets(chosen)
        assert counted.keys() == expected.keys()
        for name, of_task in expected.items():
            np.testing.assert_allclose(counted[name], of_task)
