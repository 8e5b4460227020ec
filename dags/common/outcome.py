"""What both ways of running a stage share: its result, its links and the gate's decision.

Only URIs and single numbers travel between tasks; tables and models stay in the run directory.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import httpx
from airflow.sdk import BaseOperator, BaseOperatorLink, Context, SkipMixin
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from components.addresses import read_json
from components.settings import get_settings
from dags.common.pod_end import USER_ERROR_EXIT_CODE

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

API_TIMEOUT_SECONDS = 20.0
NOTE_LENGTH = 1000  # characters Airflow keeps

log = logging.getLogger(__name__)


def raise_for_exit_code(stage: str, exit_code: int, message: str) -> None:
    """Turn the exit code of `urm <stage>` into what Airflow should do next.

    Raises:
        AirflowFailException: A mistake in the input (exit code 2); no retry can fix it.
        AirflowException: Anything else that is not success; the task is tried again.
    """
    if exit_code == 0:
        return
    reason = f"urm {stage} ended with exit code {exit_code}: {message.strip() or 'no output'}"
    if exit_code == USER_ERROR_EXIT_CODE:
        raise AirflowFailException(reason)
    raise AirflowException(reason)


def read_result(stage: str, run_dir: str) -> dict[str, Any]:
    """Content of the stage's result.json, whose presence is success.

    Raises:
        AirflowException: There is none, whatever the process or pod said.
    """
    uri = f"{run_dir}/{stage}/result.json"
    result: dict[str, Any] | None = read_json(uri)
    if result is None:
        raise AirflowException(
            f"stage {stage}: expected {uri}, got nothing; the process ended early, so the task is tried again."
        )
    return result


class StageMixin(SkipMixin):
    """What a stage's operator does after its process or pod has ended well."""

    stage: str
    task_id: str

    def finish(self, context: Context) -> None:
        """Read the result, leave its address and numbers as XCom `summary`, and decide at the gate.

        Raises:
            DownstreamTasksSkipped: The gate failed and nobody said to promote anyway.
        """
        run_dir = get_settings().run_dir(context["run_id"])
        result = read_result(self.stage, run_dir)
        metrics = {key: value for key, value in result["metrics"].items() if isinstance(value, bool | int | float)}
        summary = {
            "result": f"{run_dir}/{self.stage}/result.json",
            "seconds": result["seconds"],
            "reused_from": result.get("reused_from"),
            "counts": result["counts"],
            "metrics": metrics,
        }
        context["ti"].xcom_push(key="summary", value=summary)
        if self.stage == "gate":
            self._decide(read_json(result["outputs"]["verdict"]) or {}, context)

    def _decide(self, verdict: dict[str, Any], context: Context) -> None:
        """Log the verdict, note it on the task and on the run, and skip what follows a failure."""
        passed, promote_anyway = bool(verdict["passed"]), bool(context["params"]["promote_anyway"])
        consequence = "release and promote follow"
        if not passed:
            consequence = "released anyway, as asked" if promote_anyway else "release and promote are skipped"
        heading = f"Gate {'passed' if passed else 'FAILED'}: {consequence}."
        # The stage's own output, above in the log, ends with the verdict in words.
        for line in (heading, *verdict["reasons"]):
            self.log.info("%s", line)
        write_notes(word_note(heading, verdict, mlflow_run_url(context["run_id"])), context)
        if not passed and not promote_anyway:
            self.skip(context["ti"], cast(BaseOperator, self).get_flat_relatives(upstream=False))


def word_note(heading: str, verdict: dict[str, Any], link: str) -> str:
    """The note on a verdict: reasons first, since what is longer than NOTE_LENGTH is cut; the link stays."""
    reasons = "".join(f"- {reason}\n" for reason in verdict["reasons"])
    tracked = f"\n\n[MLflow run]({link})" if link else ""
    text = f"**{heading}**\n\n{reasons}\n{verdict['verdict']}"
    return text[: NOTE_LENGTH - len(tracked)] + tracked


def write_notes(text: str, context: Context) -> None:
    """Put the text (at most NOTE_LENGTH characters) on this task instance and on its DAG run, through the REST API.

    The task SDK of Airflow 3.3 has no call for it. A note that cannot be written is a warning, no failure: the same
    text stands in the log.
    """
    settings = get_settings()
    password = settings.airflow_password.get_secret_value()
    if not settings.airflow_url or not password:
        log.warning("No note written: set URM_AIRFLOW_URL and URM_AIRFLOW_PASSWORD for this process.")
        return
    ti = context["ti"]
    run = f"/api/v2/dags/{ti.dag_id}/dagRuns/{ti.run_id}"
    try:
        with httpx.Client(base_url=settings.airflow_url, timeout=API_TIMEOUT_SECONDS) as client:
            credentials = {"username": settings.airflow_username, "password": password}
            token = client.post("/auth/token", json=credentials).raise_for_status().json()["access_token"]
            for address in (f"{run}/taskInstances/{ti.task_id}", run):
                answer = client.patch(address, json={"note": text}, headers={"Authorization": f"Bearer {token}"})
                answer.raise_for_status()
    except httpx.HTTPError as error:
        log.warning("No note written: Airflow at %s answered %s.", settings.airflow_url, error)


class MlflowLink(BaseOperatorLink):
    """Button on a task that opens the MLflow run of its DAG run."""

    name = "MLflow run"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Address of the run's page; empty while no stage has opened the run yet."""
        return mlflow_run_url(ti_key.run_id)


def mlflow_run_url(run_id: str) -> str:
    """Address of the MLflow run of a DAG run; empty while there is none, or no server to look at."""
    settings = get_settings()
    note = read_json(f"{settings.run_dir(run_id)}/tracking.json")
    if note is None or not settings.tracking_uri.startswith("http"):
        return ""
    return settings.run_page(note["experiment_id"], note["run_id"])
