from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.config import load_config
from components.flow import STAGES
from components.settings import Settings

ROOT = Path(__file__).parents[2]


def test_every_stage_has_a_profile():
    from dags.task_factory import PROFILES

    assert list(PROFILES) == list(STAGES)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_training_within_its_budget_fits_its_task(path):
    from dags.task_factory import PROFILES

    config = load_config(path)
    for stage, budget in (("baseline", config.baseline.max_seconds), ("sft", config.urm.max_seconds)):
        # Beside the training itself a stage evaluates, and writes what it has made.
        assert 1.05 * budget <= PROFILES[stage].timeout.total_seconds(), stage


def test_local_mode_makes_a_process():
    from dags.stage_process import StageProcessOperator
    from dags.task_factory import stage_task

    task = stage_task("ingest", Settings(executor="local"))
    assert isinstance(task, StageProcessOperator)
    assert (task.task_id, task.stage) == ("ingest", "ingest")


def test_unknown_stage_is_an_error():
    from dags.task_factory import stage_task

    with pytest.raises(KeyError, match="ingets"):
        stage_task("ingets", Settings())


def test_the_pod_template_is_a_pod_with_a_base_container():
    from dags.task_factory import POD_TEMPLATE

    pod = yaml.safe_load(Path(POD_TEMPLATE).read_text())
    assert pod["kind"] == "Pod"
    assert [container["name"] for container in pod["spec"]["containers"]] == ["base"]
