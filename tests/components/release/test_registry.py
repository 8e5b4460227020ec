from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.release import registry
from components.release.registry import CANDIDATE, CHAMPION, PREVIOUS, crown, find_version, register, version_of_alias
from tests.worlds.bundles import make_bundle


@pytest.fixture
def client(tmp_path: Path) -> Iterator[MlflowClient]:
    """Of a registry of its own, within a run."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.create_experiment("tiny", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment("tiny")
    with mlflow.start_run():
        yield MlflowClient()
    mlflow.set_tracking_uri(before)


def release_bundle(folder: Path, content: bytes = b"[]") -> str:
    """Write a bundle and register it; its version."""
    manifest = make_bundle(folder, {"tasks.json": content})
    return register(folder, str(folder), manifest, "urm", manifest.tags(str(folder)))


def versions(client: MlflowClient) -> list[str]:
    return sorted(str(version.version) for version in client.search_model_versions("name = 'urm'"))


def duplicate(client: MlflowClient, version: str) -> str:
    """A second version of the same release."""
    first = client.get_model_version("urm", version)
    return str(client.create_model_version("urm", first.source, first.run_id, first.tags).version)


def alias(client: MlflowClient, name: str) -> str | None:
    found = version_of_alias(client, "urm", name)
    return None if found is None else str(found.version)


@pytest.mark.parametrize("other_is_first", [True, False])
def test_equal_content_that_is_registered_at_once_is_one_version(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_is_first: bool
) -> None:
    log_version, others = registry._log_version, list[str]()

    def register_other() -> None:
        monkeypatch.undo()
        with mlflow.start_run(nested=True):
            others.append(release_bundle(tmp_path / "other"))

    def log_beside_another(*arguments: Any) -> str:
        if other_is_first:
            register_other()
        version = log_version(*arguments)
        if not other_is_first:
            register_other()
        return version

    monkeypatch.setattr(registry, "_log_version", log_beside_another)
    version = release_bundle(tmp_path / "own")
    assert [version] == others == versions(client) == ["1"]
    assert alias(client, CANDIDATE) == version


def test_an_alias_that_another_process_sets_at_once_is_set_again(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(*_: object) -> None:
        monkeypatch.undo()
        raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: registered_model_aliases.name")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", fail_once)
    version = release_bundle(tmp_path / "bundle")
    assert alias(client, CANDIDATE) == version


def test_another_version_of_the_champion_is_not_the_release_before_it(client: MlflowClient, tmp_path: Path) -> None:
    """Registries have two versions of one release from times when equal content could be registered twice at once."""
    first, second = release_bundle(tmp_path / "a"), release_bundle(tmp_path / "b", b"[1]")
    again = duplicate(client, second)
    assert find_version(client, "urm", client.get_model_version("urm", second).tags["urm.release"]) == second
    crown(client, "urm", first, 1)
    crown(client, "urm", again, 2)
    assert crown(client, "urm", second, 3) == first
    assert (alias(client, CHAMPION), alias(client, PREVIOUS), alias(client, CANDIDATE)) == (second, first, None)
    client.set_registered_model_alias("urm", CANDIDATE, again)
    crown(client, "urm", second, 4)
    assert alias(client, CANDIDATE) is None
