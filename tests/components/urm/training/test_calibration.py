import copy
import dataclasses

import numpy as np
import pytest
import torch

from components.caches import CachePlace
from components.items.calibration import DEPTH
from components.items.id_scores import AGE_DECAY
from components.items.id_vectors import URM_SCALE
from components.items.ramps import DOUBLINGS, logarithm_slopes, ramp_features
from components.items.table import POPULARITY, ItemTable
from components.urm.network.build import build_model
from components.urm.network.files import load_model, save_model
from components.urm.training.calibration import calibrate_tasks
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
    found = calibrate_tasks(wrong_model, validation)
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


@pytest.mark.parametrize("form", [{}, {"item_dimension": 5}])
def test_a_task_gets_what_id_vectors_alone_say_where_it_pays(form, tmp_path, config, tables, table_dir, groups, steps):
    """Next purchases follow the ID vectors, which the model leaves out; new items are what it says without them."""
    urm = config.urm.model_copy(update=form)
    new = build_model(urm, ItemTable.open(table_dir), ["purchase"], CachePlace(tmp_path))
    model, table, head = new.model.eval(), new.builder.reader.table, new.model.user_head
    model.centre_tasks(steps[0])
    with torch.no_grad():
        head.gains.bias[head.gain_rows("similarity")] = 0
    examples = [example for number in range(len(groups)) for example in groups[number][1]]
    validation = Validation(examples, tables.item_ids, new.builder, urm, K)
    before, said = scores_of(model, validation), []
    items = model.item_vectors(new.builder.reader.read(tables.item_ids)).detach()
    for number, (example, old) in enumerate(zip(examples, before, strict=True)):
        vectors = torch.from_numpy(table.gather("id", new.builder.known_items(example.request.context))[0])
        weights = torch.arange(1, len(vectors) + 1) ** -AGE_DECAY
        user = model.fusion.place(head.spread_ids((weights / weights.sum()) @ vectors)).detach()
        said.append((URM_SCALE * items[:, : len(user)] @ user).numpy())
        truth = old + 3 * said[-1] if example.request.task.name == "next_purchase" else old
        best = np.argsort(-np.where(np.isfinite(truth), truth, -np.inf), kind="stable")[:3]
        examples[number] = dataclasses.replace(example, targets=tables.item_ids[best])
    found = calibrate_tasks(model, validation)
    assert found["next_purchase"].id_weight > 0
    assert found["next_purchase"].recall > found["next_purchase"].before
    assert not found["new_item"].taken

    save_model(tmp_path / "model", model, new.builder.writer, new.description)
    after = scores_of(load_model(tmp_path / "model")[0].eval(), validation)
    ramps = ramp_features(torch.from_numpy(table.gather(POPULARITY, tables.item_ids)[0][:, :1]), 1).numpy()
    shares: dict[str, list[float]] = {}
    for example, old, now, of_ids in zip(examples, before, after, said, strict=True):
        known = np.isfinite(old) & np.isfinite(now)
        explained = np.column_stack([of_ids, ramps])[known]  # and nothing else
        weights, *_ = np.linalg.lstsq(explained, (now - old)[known], rcond=None)
        np.testing.assert_allclose(explained @ weights, (now - old)[known], atol=1e-3)
        shares.setdefault(example.request.task.name, []).append(float(weights[0]))
    # The states of task texts differ by user, most of all in a model without training.
    assert np.mean(shares["next_purchase"]) == pytest.approx(found["next_purchase"].id_weight, rel=0.05)
    assert abs(np.mean(shares["new_item"])) < 0.05


def test_tasks_of_one_prompt_get_one_function(wrong_model, validation):
    renamed = []
    for number, example in enumerate(validation.examples):
        task = example.request.task
        if task.name == "next_purchase" and number % 2:
            task = task.model_copy(update={"name": "purchase_again"})
        renamed.append(dataclasses.replace(example, request=dataclasses.replace(example.request, task=task)))
    validation.examples = renamed
    found = calibrate_tasks(wrong_model, validation)
    assert found["purchase_again"].slopes is found["next_purchase"].slopes
    assert found["new_item"].slopes is not found["next_purchase"].slopes
    assert set(found) == {"next_purchase", "purchase_again", "new_item", "text_query"}


def test_equal_examples_in_new_objects_choose_the_same(wrong_model, validation):
    state = {name: weight.clone() for name, weight in wrong_model.state_dict().items()}
    first = calibrate_tasks(wrong_model, validation)
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
    second = calibrate_tasks(wrong_model, validation)
    assert {task: one.recall for task, one in second.items()} == {task: one.recall for task, one in first.items()}
    assert torch.equal(wrong_model.user_head.gains.weight, gains)


def test_a_model_that_gains_nothing_is_left_as_it_is(new_model, validation, tables):
    validation.examples = [
        dataclasses.replace(example, targets=np.array([-1])) for example in validation.examples
    ]  # nothing can be found
    before = {name: weight.clone() for name, weight in new_model.model.state_dict().items()}
    found = calibrate_tasks(new_model.model, validation)
    assert not any(calibration.taken for calibration in found.values())
    assert all(torch.equal(weight, before[name]) for name, weight in new_model.model.state_dict().items())


def test_dropout_of_the_backbone_does_not_move_what_is_set(wrong_model, validation):
    """A training leaves the model in its mode of training."""
    trained = copy.deepcopy(wrong_model)
    for module in trained.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    calibrate_tasks(wrong_model, validation)
    calibrate_tasks(trained.train(), validation)
    assert trained.training
    assert torch.equal(trained.user_head.gains.weight, wrong_model.user_head.gains.weight)
    assert torch.equal(trained.user_head.gains.bias, wrong_model.user_head.gains.bias)
