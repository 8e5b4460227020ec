import os

import pytest
import structlog

from components.flow import Resources
from tests.worlds import REPOSITORY, run_python

EDGES = {f"plan_{name}": {name} for name in ("reference", "variant", "summary")}
EDGES |= {"reference": {"variant"}, "variant": {"summary"}, "summary": set()}


@pytest.fixture(scope="module")
def dag():
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(REPOSITORY / "dags" / "ablation_study.py"))
    assert bag.import_errors == {}
    return bag.dags["ablation_study"]


def test_edges(dag):
    assert {task.task_id: task.downstream_task_ids for task in dag.tasks} == EDGES


def test_commands_are_mapped_share_the_pool_and_are_tried_again(dag):
    for name in ("reference", "variant", "summary"):
        task = dag.get_task(name)
        assert task.is_mapped
        assert task.pool == "compute"
        assert task.retries == 2
        assert task.execution_timeout.total_seconds() > 0
        assert len(task.doc_md) > 40


def test_dag_page_lists_every_task(dag):
    for number, name in enumerate(["plan_…", "reference", "variant", "summary"], start=1):
        assert f"{number}. **{name}**" in dag.doc_md


def test_default_params_are_valid_and_name_files(dag):
    params = dag.params.validate()
    assert params == {"grid": "urm", "config": "complete_journey", "overrides": []}
    assert (REPOSITORY / "configs" / "ablations" / f"{params['grid']}.yaml").is_file()


def test_plan_covers_every_variant_and_seed_once(home):
    from components.studies.ablation.grid import load_grid
    from dags.ablation_study import plan_commands

    grid = load_grid("urm", REPOSITORY / "configs")
    params = {"grid": "urm", "config": "complete_journey", "overrides": ["urm.max_steps=5"]}
    plan = plan_commands(params, "manual__2026-11-25T10:00:00+00:00")

    def planned(name):
        return [(command[3], int(command[5])) for command in plan[name]]

    assert planned("reference") == [("main", seed) for seed in grid.seeds]
    everything = [(variant, seed) for variant in grid.variants for seed in grid.seeds]
    assert sorted(planned("reference") + planned("variant")) == sorted(everything)
    assert len(plan["summary"]) == 1
    for command in (*plan["reference"], *plan["variant"], *plan["summary"]):
        assert command[-2:] == ["--set", "urm.max_steps=5"]
        run_dir = command[command.index("--run-dir") + 1]
        assert run_dir == f"{home.absolute()}/runs/manual__2026-11-25T10-00-00-00-00"


def test_planned_commands_are_ones_that_urm_knows(home):
    """Every option of a planned command is one of the real command line."""
    from typer.testing import CliRunner

    from components.cli.app import app
    from dags.ablation_study import plan_commands

    plan = plan_commands({"grid": "urm", "config": "complete_journey", "overrides": []}, "run")
    try:
        for name in ("variant", "summary"):
            answer = CliRunner().invoke(app, [*plan[name][0], "--help"])
            assert answer.exit_code == 0, answer.output
    finally:
        structlog.reset_defaults()  # the command line logs to the stream of its own call, now closed


def test_a_missing_grid_ends_the_plan(home):
    from components.exceptions import ConfigError
    from dags.ablation_study import plan_commands

    with pytest.raises(ConfigError, match=r"ablations/none\.yaml: expected a readable YAML file"):
        plan_commands({"grid": "none", "config": "complete_journey", "overrides": []}, "run")


def test_a_command_task_runs_urm(home, run):
    from dags.common.process import UrmProcessOperator

    run(UrmProcessOperator(task_id="show", arguments=["show"]))


def test_a_mistake_in_a_command_is_not_tried_again(home, run):
    from airflow.sdk.exceptions import AirflowFailException

    from dags.common.process import UrmProcessOperator

    task = UrmProcessOperator(task_id="variant", arguments=["ablation", "run", "--variant", "none"])
    with pytest.raises(AirflowFailException, match=r"exit code 2: .*option --variant: expected one of main, h_1"):
        run(task)


@pytest.mark.parametrize("executor", ["local", "kubernetes"])
def test_the_rendered_tab_shows_each_mapped_command(executor, home, render):
    from airflow.sdk import DAG

    from components.settings import Settings
    from dags.common.tasks import command_tasks

    with DAG("mapped", schedule=None):
        commands, given = (
            [["show"], ["show", "--set", "seed=1"]],
            {"doc": "A test.", "resources": Resources(hours=1), "access": "training"},
        )
        mapped = command_tasks("variant", commands, **given, settings=Settings(executor=executor)).operator
    _, context = render(mapped, map_index=1)
    shown = context["task"]
    assert shown.arguments == ["show", "--set", "seed=1"]
    environment = shown.environment if executor == "local" else shown.env_vars
    assert environment["URM_AIRFLOW_DAG_ID"] == "recall_training"
    assert {"arguments", "environment" if executor == "local" else "env_vars"} <= set(shown.template_fields)


def test_on_kubernetes_the_commands_become_pods(monkeypatch):
    from airflow.sdk import DAG, task

    from components.settings import Settings
    from dags.common.pod import UrmPodOperator
    from dags.common.tasks import command_tasks

    with DAG("pods", schedule=None):

        @task
        def commands():
            return [["show"]]

        given = {"doc": "A test.", "resources": Resources(hours=1 / 12, gpus=1), "access": "training"}
        mapped = command_tasks("variant", commands(), **given, settings=Settings(executor="kubernetes")).operator
    assert mapped.operator_class is UrmPodOperator
    assert mapped.partial_kwargs["service_account_name"] == "urm-training"
    assert mapped.partial_kwargs["cmds"] == ["urm"]
    assert mapped.partial_kwargs["active_deadline_seconds"] == 300


def test_import_is_light():
    script = (
        "import sys, airflow.sdk\nimport dags.ablation_study\n"
        'print(sorted({"torch", "pandas", "transformers", "mlflow", "matplotlib", "kubernetes"} & set(sys.modules)))\n'
        'print(sorted(name for name in sys.modules if name.startswith("components.")))'
    )
    output = run_python("-W", "ignore", "-c", script, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    heavy, ours = output.stdout.splitlines()[-2:]
    assert heavy == "[]"
    light = ("addresses", "child_process", "exceptions", "flow", "settings", "yaml_text")
    assert ours == str([f"components.{name}" for name in light])
