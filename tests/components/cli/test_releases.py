"""`urm releases` and `urm rollback` on one machine: a real registry, Redis and worker."""

import time
from collections.abc import Iterator

import pytest
import redis
import structlog
from typer.testing import CliRunner

from components.cli import app as cli
from components.cli import releases as commands
from components.deploy.promotion import Candidate, deploy, synchronize
from components.exceptions import ConfigError, ReleaseError, UnavailableError
from components.release.registry import CHAMPION, open_registry, version_of_alias
from components.settings import get_settings
from tests.worlds.recall import Release, StartWorker, build_releases
from tests.worlds.servers import RedisServer, free_port

Releases = tuple[Release, Release]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Releases:
    """In a registry of their own, where nobody else has promoted anything."""
    return build_releases(tmp_path_factory.mktemp("releases"), redis_server.url)


@pytest.fixture(autouse=True)
def environment(
    monkeypatch: pytest.MonkeyPatch, releases: Releases, start_worker: StartWorker, client: redis.Redis
) -> Iterator[None]:
    """Of the command line; its log is reset before `start_worker` stops the workers, which write to it."""
    monkeypatch.setenv("URM_HOME", str(releases[0].settings.home))
    monkeypatch.setenv("URM_REDIS_URL", releases[0].settings.redis_url)
    monkeypatch.setattr(commands, "read_config", lambda *_: releases[0].config)
    monkeypatch.setattr("components.cli.options.PIPE_WIDTH", 400)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()
    structlog.reset_defaults()


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def promote(release: Release) -> None:
    candidate = Candidate(release.name, str(release.bundle), str(release.result.metrics["manifest"]))
    deploy(release.settings, release.config.release, "urm", candidate)


def rows(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]


def test_who_promoted_what_and_why_and_the_way_back(releases: Releases, start_worker: StartWorker) -> None:
    start_worker()
    for release in releases:
        promote(release)
    newest, before, *_ = rows(invoke("releases"))
    assert newest[1:3] == [releases[1].name, "serving, champion"] and newest[4] == "promotion"
    assert before[1:3] == [releases[0].name, "previous"]
    assert newest[0] >= before[0] and "@" in newest[3] and newest[5].startswith("seconds ")
    assert newest[6] == "passed: Measured."
    assert f"serving {releases[0].name} (version " in invoke("rollback", "--why", "fewer clicks")
    newest, before, *_ = rows(invoke("releases"))
    assert (newest[1:3], newest[4]) == ([releases[0].name, "serving, champion"], "fewer clicks")
    assert before[1:3] == [releases[1].name, "previous"]
    assert f"serving {releases[1].name} " in invoke("rollback", "--to", releases[1].name, "--why", "a mistake")


def test_the_champion_is_made_what_serves(releases: Releases, start_worker: StartWorker) -> None:
    start_worker()
    for release in releases:
        promote(release)
    registry = open_registry(releases[0].settings)
    registry.set_registered_model_alias("urm", CHAMPION, str(releases[0].result.metrics["version"]))
    assert invoke("releases", "sync") == f"{releases[1].name} serves and is the champion\n"
    champion = version_of_alias(registry, "urm", CHAMPION)
    assert champion is not None and champion.tags["urm.release"] == releases[1].name
    elsewhere = releases[0].config.release.model_copy(update={"model_name": "other"})
    with pytest.raises(ReleaseError, match="expected a version of 'other' in the registry, got none"):
        synchronize(releases[0].settings, elsewhere)


def test_where_nothing_serves_or_nothing_is_known_it_says_so(
    releases: Releases, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.flushall()
    assert invoke("releases", "sync") == "nothing serves, nothing changed\n"
    monkeypatch.setenv("URM_CONFIG", "shop")  # for all commands: no option in the wrong place
    assert invoke("releases", "sync") == "nothing serves, nothing changed\n"
    result = CliRunner().invoke(cli.app, ["releases", "--config", "shop", "sync"])
    assert isinstance(result.exception, ConfigError)
    assert "expected options behind the command 'sync'" in str(result.exception)
    monkeypatch.setenv("URM_REDIS_URL", "redis://127.0.0.1:1/0")
    get_settings.cache_clear()
    result = CliRunner().invoke(cli.app, ["releases"])
    assert result.exit_code == 0 and "what serves is unknown: Redis at redis://127.0.0.1:1/0" in result.stderr
    unknown = releases[0].config.release.model_copy(update={"model_name": "none"})
    config = releases[0].config.model_copy(update={"release": unknown})
    monkeypatch.setattr(commands, "read_config", lambda *_: config)
    assert "no release is registered yet" in invoke("releases")


def test_a_registry_that_is_down_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URM_MLFLOW_URI", f"http://127.0.0.1:{free_port()}")
    get_settings.cache_clear()
    clock = time.monotonic()
    for command in (["releases"], ["rollback", "--why", "a test"]):
        with pytest.raises(UnavailableError, match=r"MLflow at http.*: expected an answer, got"):
            invoke(*command)
    assert time.monotonic() - clock < 10
