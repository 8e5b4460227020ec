import copy
import os
import textwrap
import warnings
from pathlib import Path

import pytest

from components.flow import FLOWS, STAGES, direct_inputs
from tests.worlds import REPOSITORY, run_python


@pytest.fixture(scope="module")
def bag():
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(str(REPOSITORY / "dags"))


@pytest.fixture(scope="module")
def dag(bag):
    return bag.dags["recall_training"]


def test_every_dag_file_imports_without_errors_or_warnings(bag):
    assert bag.import_errors == {}
    assert bag.captured_warnings == {}


def test_dag_id_is_the_file_name(bag):
    names = {dag_id: Path(dag.fileloc).stem for dag_id, dag in bag.dags.items()}
    assert names == {name: name for name in ("recall_training", "recall_rollback", "recall_backfill", "ablation_study")}


def test_edges(dag):
    """The arrows of the flow, which tests/components/test_flow.py compares with a literal dictionary."""
    stages = FLOWS["recall_training"]
    expected = {stage: set(direct_inputs(stage, stages)) for stage in stages}
    assert {task.task_id: task.upstream_task_ids for task in dag.tasks} == expected


def test_the_graph_honours_what_the_stages_read(dag):
    for stage, spec in STAGES.items():
        assert set(spec.inputs) <= dag.get_task(stage).get_flat_relative_ids(upstream=True)


def test_dag_page_lists_every_stage(dag):
    for number, stage in enumerate(FLOWS["recall_training"], start=1):
        assert f"{number}. **{stage}**" in dag.doc_md


def test_every_task_has_owner_timeout_doc_and_backoff(dag):
    for task in dag.tasks:
        assert task.owner == "recommendation"
        assert task.execution_timeout.total_seconds() > 0
        assert len(task.doc_md) > 40
        assert task.retries == 2
        assert task.retry_exponential_backoff


def test_heavy_stages_share_the_pool(dag):
    pooled = {task.task_id for task in dag.tasks if task.pool == "compute"}
    assert pooled == {stage for stage in FLOWS["recall_training"] if STAGES[stage].resources.pool}
    assert {"sft", "baseline"} <= pooled


def test_default_params_are_valid(dag):
    flags = {"promote_anyway": False, "force": False}
    assert dag.params.validate() == {"config": "complete_journey", "overrides": []} | flags


def test_suggested_configs_exist(dag):
    suggested = dag.params.get_param("config").schema["examples"]
    assert dag.params["config"] in suggested
    for name in suggested:
        assert (REPOSITORY / "configs" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("name", ["config", "overrides", "promote_anyway", "force"])
def test_params_are_described(dag, name):
    param = dag.params.get_param(name)
    assert param.schema["title"]
    assert len(param.description) > 20


WRONG = {"config": ["../secrets", "--help"], "overrides": [["urm.max_steps"], ["--force"], "urm.max_steps=5"]}
WRONG |= {"promote_anyway": ["perhaps"], "force": [3]}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_params_are_refused(dag, name, value):
    from airflow.sdk.exceptions import ParamValidationError

    params = copy.deepcopy(dag.params)
    with pytest.raises(ParamValidationError):
        params[name] = value
        params.validate()


def test_import_is_fast_and_light():
    """Beyond Airflow itself, which every worker has loaded already, a DAG file costs well under a second."""
    script = textwrap.dedent("""
        import sys, time
        import airflow.sdk, airflow.dag_processing.dagbag
        start = time.perf_counter()
        import dags.recall_training
        print(time.perf_counter() - start)
        print(sorted({"torch", "pandas", "transformers", "mlflow", "feast", "kubernetes"} & set(sys.modules)))
    """)
    output = run_python("-W", "ignore", "-c", script, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    seconds, loaded = output.stdout.splitlines()[-2:]
    assert float(seconds) < 1
    assert loaded == "[]"


def test_reading_the_dag_needs_no_service(monkeypatch):
    """Nothing is read at import: no variable, no connection, no file of a run."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a DAG file opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    from airflow.dag_processing.dagbag import DagBag

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="GitWildMatchPattern", category=DeprecationWarning)
        assert DagBag(str(REPOSITORY / "dags" / "recall_training.py")).import_errors == {}
