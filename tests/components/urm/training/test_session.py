"""What a training session reads of the validation examples."""

from components.caches import CachePlace
from components.items.table import ItemTable
from components.urm.data.examples import Groups
from components.urm.training.session import prepare
from tests.worlds import DEVICE
from tests.worlds.urm import *  # noqa: F403  # fixtures


def test_training_is_measured_on_a_sample_and_popularity_set_on_all_validation_examples(
    config, table_dir, tables, groups, tmp_path
):
    table = ItemTable.open(table_dir)
    held = Groups(tables.contexts, tables.examples, {task.name: task for task in config.tasks}, "validation")
    session = prepare(config, table, table, tables.catalogue, groups, held, cache=CachePlace(tmp_path), device=DEVICE)

    measured = {id(example.request.context) for example in session.validation.examples}
    assert len(measured) == config.urm.validation_contexts < len(held)

    asked = tables.examples.filter(tables.examples.column("split").to_numpy() == "validation")["task"].to_pylist()
    calibrations = session.calibrate()
    assert {task: len(found.recalls) for task, found in calibrations.items()} == {
        task: asked.count(task) for task in set(asked)
    }
