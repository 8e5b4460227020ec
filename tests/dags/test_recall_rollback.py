import copy

import pytest
import structlog

from components.flow import STAGES
from components.settings import Settings
from tests.worlds import REPOSITORY


@pytest.fixture(scope="module")
def dag():
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(REPOSITORY / "dags" / "recall_rollback.py"))
    assert bag.import_errors == {}
    return bag.dags["recall_rollback"]


def test_one_task_that_is_not_tried_again(dag):
    (task,) = dag.tasks
    assert (task.task_id, task.retries, task.pool) == ("rollback", 0, "default_pool")
    assert task.execution_timeout.total_seconds() == 3600
    assert task.credentials == ["feast", "mlflow", "recall", "redis"]


def test_the_form_asks_for_a_reason(dag):
    from airflow.sdk.exceptions import ParamValidationError

    with pytest.raises(ParamValidationError):
        dag.params.validate()
    filled = copy.deepcopy(dag.params)
    filled["why"] = "fewer clicks"
    assert filled.validate() == {"why": "fewer clicks", "to": None, "config": "complete_journey"}


@pytest.mark.parametrize(("to", "more"), [(None, []), ("urm-1a2b", ["--to=urm-1a2b"])])
def test_the_form_becomes_a_command_that_urm_knows(to, more, home, render):
    from typer.testing import CliRunner

    from components.cli.app import app
    from dags.common.tasks import command_task
    from dags.recall_rollback import rollback_arguments

    given = {
        "doc": "A test.",
        "resources": STAGES["promote"].resources,
        "access": "promotion",
        "credentials": ["redis"],
    }
    for executor in ("local", "kubernetes"):
        task = command_task("rollback", rollback_arguments, **given, settings=Settings(executor=executor))
        task, _ = render(task, why="--fewer clicks", to=to)
        assert task.arguments == ["rollback", "--config=complete_journey", "--why=--fewer clicks", *more]
    try:
        answer = CliRunner().invoke(app, [*task.arguments, "--help"])
    finally:
        structlog.reset_defaults()  # the command line logs to the stream of its own call, now closed
    assert answer.exit_code == 0, answer.output


def test_a_pod_of_it_has_the_account_that_may_promote(home, monkeypatch):
    from airflow.dag_processing.dagbag import DagBag

    from components.settings import get_settings

    monkeypatch.setenv("URM_EXECUTOR", "kubernetes")
    get_settings.cache_clear()
    (task,) = DagBag(str(REPOSITORY / "dags" / "recall_rollback.py")).dags["recall_rollback"].tasks
    assert (task.service_account_name, task.automount_service_account_token) == ("urm-promotion", True)


def test_what_fails_says_why(home, run):
    from airflow.sdk.exceptions import AirflowException

    from dags.common.process import UrmProcessOperator
    from dags.recall_rollback import rollback_arguments

    task = UrmProcessOperator(task_id="rollback", arguments=rollback_arguments, credentials=["redis"])
    with pytest.raises(AirflowException, match=r"urm rollback ended with exit code 3: .*Redis at redis://127"):
        run(task, why="a test", to="urm-1a2b")
