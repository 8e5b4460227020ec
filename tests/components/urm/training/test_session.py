"""What a training session reads of the validation examples."""

import numpy as np
import pytest

from components.caches import CachePlace
from components.items.table import ItemTable
from components.urm.data.examples import Groups
from components.urm.training import validation
from components.urm.training.session import prepare
from tests.worlds import DEVICE
from tests.worlds.urm import *  # noqa: F403  # fixtures


@pytest.fixture
def held(tables, config):
    """The contexts of validation with their examples."""
    return Groups(tables.contexts, tables.examples, {task.name: task for task in config.tasks}, "validation")


@pytest.fixture
def session(config, table_dir, tables, groups, held, tmp_path):
    table = ItemTable.open(table_dir)
    return prepare(config, table, table, tables.catalogue, groups, held, cache=CachePlace(tmp_path), device=DEVICE)


def test_training_is_measured_on_a_sample_and_popularity_set_on_all_validation_examples(session, config, tables, held):
    measured = {id(example.request.context) for example in session.validation.examples}
    assert len(measured) == config.urm.validation_contexts < len(held)

    asked = tables.examples.filter(tables.examples.column("split").to_numpy() == "validation")["task"].to_pylist()
    ranked: list[int] = []
    calibrations = session.calibrate(ranked.append)
    assert ranked == [len(asked)]
    assert {task: len(found.recalls) for task, found in calibrations.items()} == {
        task: asked.count(task) for task in set(asked)
    }


def test_recall_by_passes_is_that_of_one_pass(session, monkeypatch):
    everyone, model = session.whole_validation, session.new.model
    items, scores = everyone.recall(model, 10)
    monkeypatch.setattr(validation, "REQUESTS_PER_PASS", 5)
    ranked: list[int] = []
    again, scores_again = everyone.recall(model, 10, ranked.append)

    num = len(everyone.examples)
    assert ranked == [*range(5, num, 5), num]
    assert [row.tolist() for row in again] == [row.tolist() for row in items]
    np.testing.assert_allclose(np.stack(scores_again), np.stack(scores), rtol=1e-4)
