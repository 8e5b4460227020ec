"""Starting, keeping, restarting and stopping services, with a real redis-server in the place of all."""

import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from components.exceptions import ConfigError, UnavailableError
from components.local import services as services_module
from components.local import stack as stack_module
from components.local.airflow import read_credentials
from components.local.processes import find
from components.local.registry import Registry
from components.local.services import Service, describe_stack
from components.local.stack import down, up
from components.settings import Settings
from tests.worlds import REPOSITORY, wait_until

CONFIG = "complete_journey"
REPOSITORY_FOLDERS = {"configs_dir": "configs", "feature_repo_dir": "feature_repo"}


class ReadyAirflow:
    """Airflow's client where no Airflow is wanted: everything it is asked for is there."""

    def has_dag(self, dag_id: str) -> bool:
        """It has been read."""
        return True

    def ensure_pool(self, name: str, slots: int, description: str) -> None:
        """There is one."""


@pytest.fixture
def settings(tmp_path):
    made = Settings(home=tmp_path / ".urm", **REPOSITORY_FOLDERS)
    yield made
    down(made, lambda _: None)


@pytest.fixture
def only(monkeypatch):
    """Restrict the stack to these services; others are real in the end-to-end test."""

    def restrict(*names, extra=()):
        def describe(settings, known, config):
            stack = describe_stack(settings, known, config)
            kept = tuple(service for service in stack.services if service.name in names)
            return replace(stack, services=(*kept, *extra), airflow=ReadyAirflow())

        monkeypatch.setattr(stack_module, "describe_stack", describe)

    return restrict


def _ping(settings):
    record = Registry(settings.home).read()["redis"]
    with redis.Redis.from_url(record.url) as client:
        return client.ping()


def test_worker_and_api_serve_by_the_configuration_named(settings):
    services = {service.name: service for service in describe_stack(settings, {}, "my_shop").services}
    for name in ("recall-worker", "recall-api"):
        command = services[name].command
        assert command[command.index("--config") + 1] == "my_shop"


def test_what_worker_and_api_read_of_the_configuration_is_a_reason_to_restart_them(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(services_module, "choose_port", lambda *_, **__: 4000)
    folder = tmp_path / "configs"
    shutil.copytree(settings.configs_dir, folder)
    monkeypatch.setattr(services_module, "_find_project", lambda _: REPOSITORY)
    elsewhere = settings.model_copy(update={"configs_dir": folder})

    def fingerprints():
        return {one.name: one.fingerprint for one in describe_stack(elsewhere, {}, CONFIG).services}

    before, path = fingerprints(), folder / f"{CONFIG}.yaml"
    assert fingerprints() == before
    path.write_text(path.read_text() + "\nrecall: {filters: {all: {deny_categories: [produce]}}}\n")
    after = fingerprints()
    assert {name for name in after if after[name] != before[name]} == {"recall-worker", "recall-api"}


def test_configurations_may_lie_elsewhere_and_the_dags_do_not(settings, tmp_path, monkeypatch):
    shop = settings.model_copy(update={"configs_dir": tmp_path / "shop" / "configs"})
    airflow = next(service for service in describe_stack(shop, {}, "my_shop").services if service.name == "airflow-api")
    assert airflow.environment["URM_CONFIGS_DIR"] == str(tmp_path / "shop" / "configs")
    assert airflow.environment["AIRFLOW__CORE__DAGS_FOLDER"] == str(REPOSITORY / "dags")
    assert airflow.environment["PYTHONPATH"].split(os.pathsep)[0] == str(REPOSITORY)
    monkeypatch.setattr(services_module.components, "__file__", str(tmp_path / "site-packages/components/__init__.py"))
    with pytest.raises(ConfigError, match=r"expected the folder dags in .*, got neither; use a checkout"):
        describe_stack(shop, {}, "my_shop")


def test_credentials_are_whole_or_not_there(tmp_path, monkeypatch):
    with monkeypatch.context() as full, pytest.raises(OSError, match="full"):
        full.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
        read_credentials(tmp_path)
    known = read_credentials(tmp_path)
    assert read_credentials(tmp_path) == known
    assert (tmp_path / "credentials.json").stat().st_mode & 0o777 == 0o600


def test_up_is_idempotent_and_down_stops(settings, only):
    only("redis")
    up(settings, lambda _: None, CONFIG)
    first = Registry(settings.home).read()["redis"]
    assert _ping(settings)
    up(settings, lambda _: None, CONFIG)
    assert Registry(settings.home).read()["redis"] == first
    down(settings, lambda _: None)
    assert find(first.process) is None
    assert not (settings.home / "services.json").exists()
    assert not (settings.home / "services.env").exists()
    down(settings, lambda _: None)


def test_state_survives_down(settings, only):
    only("redis")
    url = up(settings, lambda _: None, CONFIG).url("redis")
    with redis.Redis.from_url(url) as client:
        client.set("urm:probe", "kept")
    down(settings, lambda _: None)
    url = up(settings, lambda _: None, CONFIG).url("redis")
    with redis.Redis.from_url(url) as client:
        assert client.get("urm:probe") == b"kept"


def test_a_killed_service_is_started_again(settings, only):
    only("redis")
    up(settings, lambda _: None, CONFIG)
    killed = Registry(settings.home).read()["redis"]
    os.kill(killed.process.pid, signal.SIGKILL)
    wait_until(lambda: find(killed.process) is None)
    up(settings, lambda _: None, CONFIG)
    assert _ping(settings)
    assert Registry(settings.home).read()["redis"].process != killed.process


def test_a_service_with_other_settings_is_restarted(settings, only, monkeypatch):
    only("redis")
    up(settings, lambda _: None, CONFIG)
    registry = Registry(settings.home)
    record = registry.read()["redis"]
    monkeypatch.setenv("URM_API_TOKENS_FILE", "tokens.json")
    said: list[str] = []
    up(settings, said.append, CONFIG)
    assert "restarting redis: settings or code have changed" in said
    assert registry.read()["redis"].process != record.process
    assert _ping(settings)


def test_two_homes_get_ports_of_their_own(settings, only, tmp_path):
    only("redis")
    other = Settings(home=tmp_path / "other", **REPOSITORY_FOLDERS)
    up(settings, lambda _: None, CONFIG)
    try:
        up(other, lambda _: None, CONFIG)
        assert Registry(other.home).read()["redis"].port != Registry(settings.home).read()["redis"].port
    finally:
        down(other, lambda _: None)


def test_two_homes_that_start_at_once_get_ports_of_their_own(settings, only, tmp_path):
    only("redis")
    homes = [settings, Settings(home=tmp_path / "other", **REPOSITORY_FOLDERS)]
    said = [[], []]
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda place: up(homes[place], said[place].append, CONFIG), range(2)))
        for home in homes:
            with redis.Redis.from_url(Registry(home.home).read()["redis"].url) as client:
                assert client.config_get("dir")["dir"] == str((home.home / "redis").absolute())
    finally:
        down(homes[1], lambda _: None)
    assert any("waiting" in lines[0] for lines in said)


def test_a_service_that_ends_is_named_with_its_log(settings, only):
    script = "print('no such disk'); raise SystemExit(4)"
    broken = Service("broken", (sys.executable, "-c", script), {}, is_ready=lambda: False)
    only(extra=(broken,))
    with pytest.raises(UnavailableError, match=r"service broken: expected a process that stays(.|\n)*no such disk"):
        up(settings, lambda _: None, CONFIG)


def test_a_service_that_is_never_ready_is_named_with_its_log(settings, only):
    script = "import time; print('thinking', flush=True); time.sleep(60)"
    slow = Service("slow", (sys.executable, "-c", script), {}, is_ready=lambda: False, timeout_seconds=1.5)
    only(extra=(slow,))
    with pytest.raises(UnavailableError, match=r"service slow: .*no sign of it within 2 s(.|\n)*slow.log"):
        up(settings, lambda _: None, CONFIG)


def test_secrets_are_made_once_and_stay_private(settings):
    first = describe_stack(settings, {}, CONFIG).airflow.password
    assert describe_stack(settings, {}, CONFIG).airflow.password == first
    assert (settings.home / "airflow" / "credentials.json").stat().st_mode & 0o077 == 0


def test_only_airflow_has_the_secrets_of_airflow(settings, monkeypatch):
    given = {"URM_AIRFLOW_PASSWORD": "callers", "AIRFLOW__API_AUTH__JWT_SECRET": "callers", "GITHUB_TOKEN": "callers"}
    for name, value in (given | {"AWS_SECRET_ACCESS_KEY": "s3", "URM_DEVICE": "cpu"}).items():
        monkeypatch.setenv(name, value)
    stack = describe_stack(settings, {}, CONFIG)
    secrets = {*read_credentials(settings.home / "airflow").values(), "callers"}
    assert not secrets & set(stack.environment.values())
    for service in stack.services:
        variables = service.variables()
        assert bool(secrets & set(variables.values())) is service.name.startswith("airflow-"), service.name
        assert "GITHUB_TOKEN" not in variables
        if service.name.startswith("recall-"):
            assert {"AWS_SECRET_ACCESS_KEY", "PATH", "URM_DEVICE", "URM_REDIS_URL", "URM_MLFLOW_URI"} <= set(variables)


def test_a_service_has_no_more_than_its_variables(settings, only, monkeypatch):
    monkeypatch.setenv("URM_AIRFLOW_PASSWORD", "callers")
    monkeypatch.delenv("LC_CTYPE", raising=False)  # without a locale Python sets it itself: in this process, then
    output = settings.home.absolute() / "environment.json"
    script = f"import json, os, time; json.dump(dict(os.environ), open({str(output)!r}, 'w')); time.sleep(60)"
    probe = Service("probe", (sys.executable, "-c", script), {"URM_PROBE": "1"}, output.exists)
    only(extra=(probe,))
    up(settings, lambda _: None, CONFIG)
    variables = json.loads(output.read_text())
    variables.pop("LC_CTYPE", None)  # in the probe
    assert variables == probe.variables() | {"URM_PROBE": "1"}
    assert "URM_AIRFLOW_PASSWORD" not in variables
