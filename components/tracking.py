"""MLflow: one parent run for a pipeline run, and a nested run for each stage that trains or evaluates."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from components.addresses import join, read_json, write_json
from components.exceptions import ConfigError, UnavailableError
from components.mlflow_server import REFUSED, brief_requests, mlflow_errors, no_answer, open_server, require_server
from components.settings import Settings, hide_credentials
from components.storage import StageRun

if TYPE_CHECKING:
    import mlflow.entities

log = structlog.get_logger()

_FINAL = (*REFUSED, "INVALID_PARAMETER_VALUE")  # trying again changes nothing
_AT_ONCE_MS = 60_000  # stages that began within this time may have made a run each, clocks of machines included


@contextmanager
def track(stage: StageRun, *, resume: bool = False) -> Iterator[mlflow.entities.Run]:
    """Open the nested MLflow run of a stage; use the `mlflow` module inside.

    The run ends as FINISHED, or as FAILED if the body raises; if the server is away then, it stays RUNNING, with a
    warning. With `resume`, an attempt continues the run of an earlier one that did not succeed.

    A thread of MLflow sends what the body logs with `synchronous=False`: in order, each for about four minutes if the
    server is away. It says what it gives up, and the body goes on.

    Raises:
        ConfigError: The experiment is deleted, or the server lets this user not write to it.
        UnavailableError: The tracking server does not answer, or not to what the body logs otherwise.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    # MLflow's ten threads would send in any order, and an outage would cost ten batches every four minutes, not one.
    os.environ.setdefault("MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE", "1")
    parent, uri = parent_run_id(stage), stage.settings.tracking_uri
    tags = _tags(stage) | {"urm.stage": stage.spec.name}
    note = join(stage.lasting, "tracking.json")
    known = (read_json(note) or {}) if resume else {}
    with mlflow_errors(uri):
        try:
            earlier = known["run_id"] if known.get("parent") == parent and _has_run(known["run_id"]) else None
            name = {"run_id": earlier} if earlier else {"run_name": stage.spec.name}
            mlflow.start_run(run_id=parent, log_system_metrics=False)
            run = mlflow.start_run(**name, nested=True, tags=tags, log_system_metrics=False)
            if resume and not earlier:
                write_json(note, {"run_id": run.info.run_id, "parent": parent})
            yield run
        except BaseException:
            _end_runs(uri, "FAILED")
            raise
    with suppress(MlflowException):  # a result waits some minutes for a server that restarts, an error does not
        mlflow.get_run(run.info.run_id)
    _end_runs(uri, "FINISHED")


def _end_runs(uri: str, status: str) -> None:
    """End the run of a stage and its parent, once what waits is sent; a failure costs neither a result nor an error."""
    import mlflow
    from mlflow.exceptions import MlflowException

    with ExitStack() as patience:
        try:
            require_server(uri)
        except (ConfigError, UnavailableError):
            patience.enter_context(brief_requests())
        while (run := mlflow.active_run()) is not None:
            try:
                mlflow.end_run(status)
            except (MlflowException, OSError) as error:
                said = str(no_answer(uri, error))
                log.warning("MLflow run stays RUNNING: it cannot be ended", run=run.info.run_id, error=said)


def log_if_possible(function: Callable[..., object], *arguments: object) -> None:
    """Call a function of `mlflow` that writes to the open run; a server that is away costs a training no more than it.

    It is waited for as long as MLflow's client does by itself, about four minutes.
    """
    import mlflow

    try:
        function(*arguments)
    except Exception as error:  # the driver of an artifact store has errors of its own
        if getattr(error, "error_code", "") in _FINAL:
            raise
        said = str(no_answer(mlflow.get_tracking_uri(), error))
        log.warning("MLflow run lacks something of this stage", what=arguments[-1], error=said)


@contextmanager
def track_study(settings: Settings, experiment: str, name: str) -> Iterator[mlflow.entities.Run]:
    """Open an MLflow run of its own, for what looks at several pipeline runs; use the `mlflow` module inside.

    Raises:
        ConfigError: The server lets this user not write to it.
        UnavailableError: It does not answer.
    """
    import mlflow

    open_server(settings.tracking_uri)
    with mlflow_errors(settings.tracking_uri):
        _open_experiment(settings, experiment)
        with mlflow.start_run(run_name=name, log_system_metrics=False) as run:
            yield run


def log_examples(path: Path, config: str, *splits: str) -> None:
    """Note on the open run which examples of a file it uses, as MLflow data sets named `<config>.<split>`."""
    import mlflow
    import mlflow.data.sources as sources
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from mlflow.data.pandas_dataset import from_pandas

    # The class is made when MLflow is imported; a plain path would have it warn that two classes fit.
    source = sources.LocalArtifactDatasetSource(str(path))  # type: ignore[attr-defined]  # made at import
    for split in splits:
        rows = pq.read_table(
            path, columns=["example_id", "task", "target_item_ids"], filters=pc.field("split") == split
        )
        # Floats: MLflow hints at missing values for every integer column.
        columns = {
            "example_id": rows.column("example_id").cast("float64"),
            "task": rows.column("task"),
            "num_targets": pc.list_value_length(rows.column("target_item_ids")).cast("float64"),
        }
        frame = pa.table(columns).to_pandas()
        mlflow.log_input(from_pandas(frame, source=source, name=f"{config}.{split}"), context=split)


def parent_run_id(stage: StageRun) -> str:
    """Id of the pipeline run's MLflow run, made on first use and noted in the run directory.

    Raises:
        ConfigError: The experiment is deleted, or the server lets this user not write to it.
        UnavailableError: The tracking server does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    settings, server = stage.settings, hide_credentials(stage.settings.tracking_uri)
    open_server(settings.tracking_uri)
    note = join(stage.run_dir, "tracking.json")
    known = read_json(note)
    with mlflow_errors(settings.tracking_uri):
        try:
            experiment = _open_experiment(settings, stage.config.name)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ConfigError(
                f"MLflow at {server}, experiment {stage.config.name}",
                expected="one that takes runs",
                got=str(error).splitlines()[0],
                remedy="restore the experiment or delete it for good",
            ) from error
        place = {"tracking_uri": server, "experiment_id": experiment}
        if known is not None and place.items() <= known.items() and _has_run(known["run_id"]):
            return str(known["run_id"])
        name = stage.run_dir.rstrip("/").rsplit("/", 1)[-1]
        with mlflow.start_run(run_name=name, tags=_tags(stage), log_system_metrics=False) as run:
            try:
                mlflow.log_dict(stage.config.model_dump(mode="json"), "config.yaml")
            except OSError as error:
                raise no_answer(settings.tracking_uri, error) from error
            mlflow.log_params({"config": stage.config.name, "seed": stage.config.seed})
        run_id = _agree(run, stage.run_dir)
    write_json(note, place | {"run_id": run_id})
    return run_id


def _agree(made: mlflow.entities.Run, run_dir: str) -> str:
    """Id of the first of the runs that stages which begin at once made for one pipeline run; another is removed."""
    from mlflow import MlflowClient
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    client, about = MlflowClient(), made.info
    recent = client.search_runs(
        [about.experiment_id],
        f"attributes.start_time > {about.start_time - _AT_ONCE_MS}",
        order_by=["attributes.start_time ASC"],
    )
    tags = ((run.info.run_id, run.data.tags) for run in recent)
    of_pipeline = (
        run_id for run_id, known in tags if known.get("urm.run_dir") == run_dir and MLFLOW_PARENT_RUN_ID not in known
    )
    first = str(next(of_pipeline, about.run_id))
    if first != about.run_id:
        client.delete_run(about.run_id)
    return first


def _has_run(run_id: str) -> bool:
    """Whether the noted run is still there; it, or the database, may have been deleted."""
    from mlflow import MlflowClient
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    try:
        return bool(MlflowClient().get_run(run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _open_experiment(settings: Settings, name: str) -> str:
    """Set the experiment; returns its id.

    Without a server its files go to the home folder, not to wherever the command runs.
    """
    import mlflow

    if settings.tracking_uri.startswith("sqlite:///"):
        folder = (settings.home / "mlflow").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the first access makes the tables, which two processes cannot at once
            if mlflow.get_experiment_by_name(name) is None:
                mlflow.create_experiment(name, artifact_location=(folder / "artifacts").as_uri())
    return str(mlflow.set_experiment(name).experiment_id)


def _tags(stage: StageRun) -> dict[str, str]:
    settings = stage.settings
    tags = {"urm.config": stage.config.name, "urm.run_dir": stage.run_dir}
    if settings.airflow_run_id:
        tags["airflow.dag_id"] = settings.airflow_dag_id
        tags["airflow.run_id"] = settings.airflow_run_id
        tags["airflow.url"] = f"{settings.airflow_url}/dags/{settings.airflow_dag_id}/runs/{settings.airflow_run_id}"
    return tags
