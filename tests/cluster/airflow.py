"""Airflow on this machine, as `urm up` starts it, whose stages are pods of the cluster."""

from pathlib import Path
from typing import Any

import psutil

from components.local.airflow import POOL, AirflowClient
from components.local.processes import ProcessRecord, find, run_to_end, spawn, stop
from components.local.services import Service, describe_stack
from components.settings import Settings
from tests.cluster.world import pause_until
from tests.worlds import REPOSITORY, wait_until

TRAINING, STUDY, BACKFILL = "recall_training", "ablation_study", "recall_backfill"
ENDED = ("success", "failed", "skipped", "upstream_failed")
Json = dict[str, Any]


class Airflow:
    """Its four services, and its REST API as people use it through the UI.

    Args:
        home: Folder of its state.
        environment: Variables of its processes beside those that `urm up` gives them.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        settings = Settings(home=home, configs_dir=REPOSITORY / "configs", feature_repo_dir=REPOSITORY / "feature_repo")
        self.home, self.environment = home, environment
        self.stack = describe_stack(settings, {}, "complete_journey")
        self.stack.airflow._http.timeout = 120  # it shares the cores of one machine with the pods
        self.services = {one.name: one for one in self.stack.services if one.name.startswith("airflow")}
        self.records: dict[str, ProcessRecord] = {}

    @property
    def client(self) -> AirflowClient:
        """Client of its API."""
        return self.stack.airflow

    def begin(self, *dags: str) -> None:
        """Prepare the database, start everything, and wait until the DAGs, by default ours, have been read."""
        first = self.services["airflow-api"]
        log = self.home / "logs" / "migrate.log"
        assert run_to_end(self.stack.migrate, environment=self._variables(first), log=log, folder=self.home) == 0
        self.start(*self.services)
        for dag in dags or (TRAINING, STUDY, BACKFILL):
            wait_until(lambda dag=dag: self.client.has_dag(dag) or self.client.import_errors(), 120)
        assert not self.client.import_errors()
        self.client.ensure_pool(POOL, 2, "Heavy stages at once.")
        self.client._send("PATCH", f"/pools/{POOL}", json={"pool": POOL, "slots": 2, "include_deferred": True})

    def start(self, *names: str) -> None:
        """Start services, and wait until each is ready."""
        for name in names:
            log = self.home / "logs" / f"{name}.log"
            environment = self._variables(self.services[name])
            command = self.services[name].command
            self.records[name] = spawn(command, environment=environment, log=log, folder=REPOSITORY)
        for name in names:
            wait_until(self.services[name].is_ready, self.services[name].timeout_seconds)

    def kill(self, *names: str) -> None:
        """SIGKILL services with all their children, as the loss of their machine does."""
        for name in names:
            process = find(self.records.pop(name))
            assert process is not None
            for member in [*process.children(recursive=True), process]:
                kill_process(member)

    def end(self) -> None:
        """Stop everything."""
        order = ["airflow-scheduler", "airflow-triggerer", "airflow-dag-processor", "airflow-api"]
        for name in order:
            stop([self.records[name]] if name in self.records else [], 10)
        self.client.close()

    def run(self, dag: str, run_id: str) -> Json:
        """State, note and times of a run."""
        return self.client.run(dag, run_id)

    def runs(self, dag: str) -> list[str]:
        """Ids of all runs of a DAG."""
        return [str(run["dag_run_id"]) for run in self.client._send("GET", f"/dags/{dag}/dagRuns").json()["dag_runs"]]

    def unpause(self, dag: str) -> None:
        """What the switch of a DAG does."""
        self.client._send("PATCH", f"/dags/{dag}", json={"is_paused": False})

    def task(self, run_id: str, task_id: str = "sft") -> Json:
        """A task instance of `recall_training`."""
        return self.client.tasks(TRAINING, run_id)[task_id]

    def state(self, run_id: str, task_id: str = "sft") -> str | None:
        """Its state."""
        found: str | None = self.task(run_id, task_id)["state"]
        return found

    def wait(self, run_id: str, task_id: str = "sft", seconds: float = 300) -> Json:
        """A task instance that has ended."""
        pause_until(lambda: self.state(run_id, task_id) in ENDED, seconds)
        return self.task(run_id, task_id)

    def log(self, run_id: str, task_id: str, try_number: int) -> str:
        """Log of one try, with the messages of exceptions, as the UI shows it; empty before the try."""
        address = f"/dags/{TRAINING}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        answer = self.client._send("GET", address, allowed=(404,), headers={"Accept": "application/json"})
        entries = answer.json()["content"] if answer.status_code == 200 else []
        errors = [error["exc_value"] for entry in entries for error in entry.get("error_detail") or ()]
        return "\n".join([str(entry["event"]) for entry in entries] + errors)

    def mark(self, run_id: str, task_id: str, state: str) -> None:
        """What the button *Mark as …* does."""
        address = f"/dags/{TRAINING}/dagRuns/{run_id}/taskInstances/{task_id}"
        self.client._send("PATCH", address, json={"new_state": state})

    def clear(self, run_id: str, *task_ids: str) -> None:
        """What the button *Clear* does, for these tasks alone."""
        body = {"dag_run_id": run_id, "task_ids": list(task_ids), "only_failed": False, "dry_run": False}
        self.client._send("POST", f"/dags/{TRAINING}/clearTaskInstances", json=body)

    def end_run(self, dag: str, run_id: str) -> None:
        """Mark a whole run as failed, so that the next may begin."""
        self.client._send("PATCH", f"/dags/{dag}/dagRuns/{run_id}", json={"state": "failed"})

    def _variables(self, service: Service) -> dict[str, str]:
        return service.variables() | self.environment


def kill_process(process: psutil.Process) -> None:
    """SIGKILL, unless it has ended."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass
