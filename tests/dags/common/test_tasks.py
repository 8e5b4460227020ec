from pathlib import Path

import pytest
import yaml

from components.config import load_config
from components.flow import STAGES
from components.settings import Settings
from tests.worlds import REPOSITORY


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_training_within_its_budget_fits_its_task(path):
    config = load_config(path)
    for stage, budget in (("baseline", config.baseline.max_seconds), ("sft", config.urm.max_seconds)):
        # Beside the training itself a stage evaluates, and writes what it has made.
        assert 1.05 * budget <= STAGES[stage].resources.hours * 3600, stage


def test_local_mode_makes_a_process():
    from dags.common.process import StageProcessOperator
    from dags.common.tasks import stage_task

    task = stage_task("ingest", Settings(executor="local"))
    assert isinstance(task, StageProcessOperator)
    assert (task.task_id, task.stage) == ("ingest", "ingest")


def test_unknown_stage_is_an_error():
    from dags.common.tasks import stage_task

    with pytest.raises(KeyError, match="ingets"):
        stage_task("ingets", Settings())


def test_the_pod_template_is_a_pod_with_a_base_container():
    from dags.common.tasks import POD_TEMPLATE

    pod = yaml.safe_load(Path(POD_TEMPLATE).read_text())
    assert pod["kind"] == "Pod"
    assert [container["name"] for container in pod["spec"]["containers"]] == ["base"]
