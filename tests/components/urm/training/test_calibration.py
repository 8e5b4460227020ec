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


def test_every_task_gets_its_own_function_of_the_count(new_model, groups, validation, steps, tables):
    model, table = new_model.model, new_model.builder.reader.table
    model.centre_tasks(steps[0])
    log_counts = torch.from_numpy(table.gather(POPULARITY, tables.item_ids)[0])
    asked = {example.request.task.name for example in validation.examples}
    # Popularity is what matters, and the model has it the wrong way round.
    popular = np.argsort(-log_counts[:, 0].numpy(), kind="stable")[:K]
    validation.examples = [
        dataclasses.replace(example, targets=tables.item_ids[popular]) for example in validation.examples
    ]
    rows = model.user_head.gain_rows("popularity")
    wrong = logarithm_slopes([-2.0, *[0.0] * (log_counts.shape[1] - 1)], model.ramps)
    with torch.no_grad():
        model.user_head.gains.bias[rows] = wrong / model.user_head.scales[rows]
        model.user_head.gains.weight[rows] = 0
    before, recall = scores_of(model, validation), validation.measure(model)
    found = calibrate_popularity(model, validation)
    after = scores_of(model, validation)
    assert set(found) == asked
    assert all(calibration.taken for calibration in found.values())
    assert validation.measure(model)["mean"] > 3 * recall["mean"]
    for example, old, new in zip(validation.examples, before, after, strict=True):
        slopes = found[example.request.task.name].slopes
        known = np.isfinite(old)
        assert known.sum() > K
        wanted = (ramp_features(log_counts[:, :1], 1) @ slopes).numpy()
        np.testing.assert_allclose((new - old)[known], wanted[known], atol=0.1 * np.abs(wanted).max())  # by query
    assert len(tables.item_ids) < DEPTH
    assert len(slopes) == DOUBLINGS


def test_a_model_that_gains_nothing_is_left_as_it_is(new_model, validation, tables):
    validation.examples = [
        dataclasses.replace(example, targets=np.array([-1])) for example in validation.examples
    ]  # nothing can be found
    before = {name: weight.clone() for name, weight in new_model.model.state_dict().items()}
    found = calibrate_popularity(new_model.model, validation)
    assert not any(calibration.taken for calibration in found.values())
    assert all(torch.equal(weight, before[name]) for name, weight in new_model.model.state_dict().items())
