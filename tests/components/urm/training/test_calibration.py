import copy
import dataclasses

import numpy as np
import pytest
import torch

from components.items.calibration import DEPTH
from components.items.ramps import DOUBLINGS, logarithm_slopes, ramp_features
from components.items.table import POPULARITY
from components.urm.training.calibration import calibrate_popularity
from components.urm.training.validation import Validation
from tests.worlds.urm import *  # noqa: F403  # fixtures

K = 5


@pytest.fixture
def validation(new_model, groups, tables, config):
    examples = [example for number in range(len(groups)) for example in groups[number][1]]
    return Validation(examples, tables.item_ids, new_model.builder, config.urm, K)


def scores_of(model, validation):
    """Scores of all items [E, N] by ascending id."""
    ids, scores = validation.recall(model, len(validation.item_ids))
    rows = np.full((len(ids), len(validation.item_ids)), np.nan)
    for row, found, of_row in zip(rows, ids, scores, strict=True):
        row[np.searchsorted(validation.item_ids, found)] = of_row
    return rows


@pytest.fixture
def wrong_model(new_model, validation, steps, tables):
    """A model that has popularity, which is what matters, the wrong way round."""
    model, table = new_model.model, new_model.builder.reader.table
    model.centre_tasks(steps[0])
    log_counts, _ = table.gather(POPULARITY, tables.item_ids)
    popular = tables.item_ids[np.argsort(-log_counts[:, 0], kind="stable")[: 2 * K]]
    rng = np.random.default_rng(0)
    validation.examples = [
        dataclasses.replace(example, targets=rng.choice(popular, 3, replace=False)) for example in validation.examples
    ]
    rows = model.user_head.gain_rows("popularity")
    wrong = logarithm_slopes([-2.0, *[0.0] * (log_counts.shape[1] - 1)], model.ramps)
    with torch.no_grad():
        model.user_head.gains.bias[rows] = wrong / model.user_head.scales[rows]
        model.user_head.gains.weight[rows] = 0
    return model


def test_every_task_gets_its_own_function_of_the_count(wrong_model, new_model, validation, tables):
    log_counts, _ = new_model.builder.reader.table.gather(POPULARITY, tables.item_ids)
    before, recall = scores_of(wrong_model, validation), validation.measure(wrong_model)
    found = calibrate_popularity(wrong_model, validation)
    after = scores_of(wrong_model, validation)
    assert set(found) == {example.request.task.name for example in validation.examples}
    assert all(calibration.taken for calibration in found.values())
    assert validation.measure(wrong_model)["mean"] > 3 * recall["mean"]
    for example, old, new in zip(validation.examples, before, after, strict=True):
        slopes = found[example.request.task.name].slopes
        known = np.isfinite(old)
        assert known.sum() > K
        wanted = (ramp_features(torch.from_numpy(log_counts[:, :1]), 1) @ slopes).numpy()
        np.testing.assert_allclose((new - old)[known], wanted[known], atol=0.1 * np.abs(wanted).max())  # by query
    assert len(tables.item_ids) < DEPTH
    assert len(slopes) == DOUBLINGS


def test_tasks_of_one_prompt_get_one_function(wrong_model, validation):
    renamed = []
    for number, example in enumerate(validation.examples):
        task = example.request.task
        if task.name == "next_purchase" and number % 2:
            task = task.model_copy(update={"name": "purchase_again"})
        renamed.append(dataclasses.replace(example, request=dataclasses.replace(example.request, task=task)))
    validation.examples = renamed
    found = calibrate_popularity(wrong_model, validation)
    assert found["purchase_again"].slopes is found["next_purchase"].slopes
    assert found["new_item"].slopes is not found["next_purchase"].slopes
    assert set(found) == {"next_purchase", "purchase_again", "new_item", "text_query"}


def test_equal_examples_in_new_objects_choose_the_same(wrong_model, validation):
    state = {name: weight.clone() for name, weight in wrong_model.state_dict().items()}
    first = calibrate_popularity(wrong_model, validation)
    gains = wrong_model.user_head.gains.weight.clone()
    wrong_model.load_state_dict(state, strict=False)  # without a tied output embedding
    contexts = {id(example.request.context): example.request.context for example in validation.examples}
    copies = {number: dataclasses.replace(contexts[number]) for number in reversed(contexts)}
    validation.examples = [
        dataclasses.replace(
            example, request=dataclasses.replace(example.request, context=copies[id(example.request.context)])
        )
        for example in validation.examples
    ]
    second = calibrate_popularity(wrong_model, validation)
    assert {task: one.after for task, one in second.items()} == {task: one.after for task, one in first.items()}
    assert torch.equal(wrong_model.user_head.gains.weight, gains)


def test_a_model_that_gains_nothing_is_left_as_it_is(new_model, validation, tables):
    validation.examples = [
        dataclasses.replace(example, targets=np.array([-1])) for example in validation.examples
    ]  # nothing can be found
    before = {name: weight.clone() for name, weight in new_model.model.state_dict().items()}
    found = calibrate_popularity(new_model.model, validation)
    assert not any(calibration.taken for calibration in found.values())
    assert all(torch.equal(weight, before[name]) for name, weight in new_model.model.state_dict().items())


def test_dropout_of_the_backbone_does_not_move_what_is_set(wrong_model, validation):
    """A training leaves the model in its mode of training."""
    trained = copy.deepcopy(wrong_model)
    for module in trained.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    calibrate_popularity(wrong_model, validation)
    calibrate_popularity(trained.train(), validation)
    assert trained.training
    assert torch.equal(trained.user_head.gains.weight, wrong_model.user_head.gains.weight)
    assert torch.equal(trained.user_head.gains.bias, wrong_model.user_head.gains.bias)
