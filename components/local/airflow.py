"""Airflow on this machine: its environment, and a client of its REST API."""

import json
import secrets
from pathlib import Path
from typing import Any

import httpx

from components.exceptions import UnavailableError
from components.local.registry import replace_private

USERNAME = "admin"
POOL = "compute"
TIMEOUT_SECONDS = 30.0
# Task processes at once; the pool keeps heavy stages to one of them.
PARALLELISM = 3
_SECRET_BYTES = {"password": 9, "jwt_secret": 48, "secret_key": 32}


def read_credentials(home: Path) -> dict[str, str]:
    """Admin's `password` and shared `jwt_secret` and `secret_key`; made on first use, kept in the home folder."""
    path = home / "credentials.json"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        content = {name: secrets.token_urlsafe(size) for name, size in _SECRET_BYTES.items()}
        replace_private(path, json.dumps(content))
    known: dict[str, str] = json.loads(path.read_text())
    replace_private(home / "passwords.json", json.dumps({USERNAME: known["password"]}))
    return known


def airflow_environment(home: Path, dags: Path, url: str, credentials: dict[str, str]) -> dict[str, str]:
    """Configuration of all Airflow processes as environment variables; the `url` has no trailing slash."""
    values = {
        "core__dags_folder": dags,
        "core__load_examples": False,
        "core__executor": "LocalExecutor",
        "core__parallelism": PARALLELISM,
        "core__dags_are_paused_at_creation": False,
        "core__execution_api_server_url": f"{url}/execution/",
        "core__simple_auth_manager_users": f"{USERNAME}:admin",
        "core__simple_auth_manager_passwords_file": home / "passwords.json",
        "api__base_url": url,
        "api__instance_name": "URM",
        "api__secret_key": credentials["secret_key"],
        "api_auth__jwt_secret": credentials["jwt_secret"],
        "database__sql_alchemy_conn": f"sqlite:///{home / 'airflow.db'}",
        "logging__base_log_folder": home / "logs",
        "dag_processor__parsing_processes": 1,
        # A task whose process is gone (the machine was switched off) is tried again after a minute.
        "scheduler__task_instance_heartbeat_timeout": 60,
        "usage_data_collection__enabled": False,
    }
    environment = {f"AIRFLOW__{key.upper()}": str(value) for key, value in values.items()}
    return environment | {"AIRFLOW_HOME": str(home)}


class AirflowClient:
    """Calls of the REST API (v2) that the local commands need, as a user of the simple auth manager."""

    def __init__(self, url: str, username: str, password: str) -> None:
        self._url = url
        self.username, self.password = username, password
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def health(self) -> dict[str, str]:
        """Component → healthy | unhealthy; empty while the server does not answer."""
        try:
            answer = self._http.get("/api/v2/monitor/health").raise_for_status().json()
        except httpx.HTTPError:
            return {}
        return {name: str((part or {}).get("status")) for name, part in answer.items()}

    def ensure_pool(self, name: str, slots: int, description: str) -> None:
        """Create the pool unless there is one of that name; a size set by hand stays."""
        if self._send("GET", f"/pools/{name}", allowed=(404,)).status_code == 404:
            self._send("POST", "/pools", json={"name": name, "slots": slots, "description": description})

    def import_errors(self) -> list[str]:
        """What is wrong with DAG files, if anything."""
        found = self._send("GET", "/importErrors").json()["import_errors"]
        return [f"{error['filename']}: {error['stack_trace'].strip().splitlines()[-1]}" for error in found]

    def has_dag(self, dag_id: str) -> bool:
        """Whether the DAG has been read."""
        return self._send("GET", f"/dags/{dag_id}", allowed=(404,)).status_code == 200

    def trigger(self, dag_id: str, conf: dict[str, Any]) -> str:
        """Unpause the DAG, start a run with these params, and return the run's id."""
        self._send("PATCH", f"/dags/{dag_id}", json={"is_paused": False})
        body = {"logical_date": None, "conf": conf}
        return str(self._send("POST", f"/dags/{dag_id}/dagRuns", json=body).json()["dag_run_id"])

    def active_runs(self, dag_id: str) -> list[str]:
        """Ids of the runs that have not ended."""
        found = self._send("GET", f"/dags/{dag_id}/dagRuns", params={"state": ["running", "queued"]}).json()
        return [str(run["dag_run_id"]) for run in found["dag_runs"]]

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """State, note and times of a run."""
        content: dict[str, Any] = self._send("GET", f"/dags/{dag_id}/dagRuns/{run_id}").json()
        return content

    def tasks(self, dag_id: str, run_id: str) -> dict[str, dict[str, Any]]:
        """Task instances of a run by task id."""
        found = self._send("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances").json()["task_instances"]
        return {str(task["task_id"]): task for task in found}

    def extra_links(self, dag_id: str, run_id: str, task_id: str) -> dict[str, str | None]:
        """Buttons of a task instance: name → address."""
        address = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/links"
        links: dict[str, str | None] = self._send("GET", address).json()["extra_links"]
        return links

    def log_lines(self, dag_id: str, run_id: str, task_id: str, try_number: int) -> list[str]:
        """Lines of one try's log, without their time stamps."""
        address = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{max(try_number, 1)}"
        content = self._send("GET", address, headers={"Accept": "application/json"}).json()["content"]
        return [str(entry["event"]) if isinstance(entry, dict) else str(entry) for entry in content]

    def _send(self, method: str, path: str, allowed: tuple[int, ...] = (), **options: Any) -> httpx.Response:
        """Send one request with a token; a token that has run out is renewed once."""
        try:
            if "Authorization" not in self._http.headers:
                self._log_in()
            answer = self._http.request(method, f"/api/v2{path}", **options)
            if answer.status_code == 401:
                self._log_in()
                answer = self._http.request(method, f"/api/v2{path}", **options)
            if answer.status_code not in allowed:
                answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            detail = error.response.text[:300] or error.response.reason_phrase
            raise UnavailableError(
                f"Airflow at {self._url}, {method} {path}",
                expected="success",
                got=f"{error.response.status_code} {detail}",
                remedy="look at .urm/logs/airflow-api.log",
            ) from None
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"Airflow at {self._url}", expected="an answer", got=error, remedy="start it with `urm up`"
            ) from None
        return answer

    def _log_in(self) -> None:
        answer = self._http.post(
            "/auth/token", json={"username": self.username, "password": self.password}
        ).raise_for_status()
        self._http.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
