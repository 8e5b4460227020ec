"""The Feast store of a run: opened in place, filled by the features stage, read online by the recall worker.

Its folder has the Parquet sources and the registry, with relative paths inside, so that it may be renamed, moved or
copied as a whole. In the environment `embedded` the online store is a file of it, too. In `production` that is Redis,
and the definitions stand in a SQL registry besides, which only the features stage needs: each run has a Feast project
of its own there, so that a new run changes nothing that a serving release reads (ADR 25).
"""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import redis
import yaml
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from components.exceptions import ConfigError, DataError, MissingInputError, UnavailableError
from components.features.feast import (
    Entity,
    FeastError,
    FeastModuleImportError,
    FeatureService,
    FeatureStore,
    FeatureView,
    Registry,
    RepoConfig,
    get_online_store_from_config,
)
from components.progress import Progress, Report
from components.settings import Settings

SERVICE = "user_history"
_REGISTRY = "registry.db"
_REGISTRY_FILE = {"registry_type": "file", "path": _REGISTRY, "cache_ttl_seconds": 0}
_AGAIN = "run `urm features` again"
# Feast loads the class of the offline store whenever it opens a store; this one needs no package and is never asked.
_NO_OFFLINE_STORE = {"type": "remote", "host": "none"}
MATERIALIZE_ROWS = 8192
BEHAVIOR_SEQUENCE = "behavior_sequence"
USER_STATISTICS = "user_statistics"
MICROSECONDS_A_DAY = timedelta(days=1) // timedelta(microseconds=1)


@dataclass(frozen=True)
class History:
    """What is known of one user at an instant; the fields are those of the CONTEXTS table.

    A user without events has empty lists and zero counts.
    """

    history_item_ids: list[int]
    history_counts: list[int]
    history_days_since: list[float]
    history_behaviors: list[str]
    num_events: int
    num_items: int
    num_active_days: int
    days_since_last: float
    top_categories: list[str]


def online_files(settings: Settings) -> tuple[str, ...]:
    """Files of the store's folder that online reads need."""
    return (_REGISTRY, "online.db") if settings.feature_environment == "embedded" else (_REGISTRY,)


def open_feature_store(folder: Path, settings: Settings) -> FeatureStore:
    """Open the store that the features stage left: its output `feature_store`, or a copy of it.

    Raises:
        MissingInputError: The folder holds no registry.
        DataError: The registry holds code.
        ConfigError: The folder was written for another environment; the environment's feature_store.yaml is missing or
            wrong; or the packages or variables it needs are missing.
    """
    return _open_written(folder, settings, {})


def open_online_store(folder: Path, settings: Settings) -> FeatureStore:
    """As `open_feature_store`, for online reads alone.

    The packages of the offline store need not be there, and of the folder only `online_files`.

    Raises:
        MissingInputError: As `open_feature_store`.
        DataError: As `open_feature_store`.
        ConfigError: As `open_feature_store`.
    """
    return _open_written(folder, settings, {"offline_store": _NO_OFFLINE_STORE})


def hash_registry(folder: Path) -> str:
    """SHA-256 of what a store's registry defines; materialising features does not change it.

    Raises:
        MissingInputError: The folder holds no registry.
        DataError: The registry is none, or holds code.
    """
    registry = _read_registry(folder)
    registry.ClearField("last_updated")
    registry.ClearField("version_id")
    for one in (*registry.entities, *registry.feature_views, *registry.feature_services, *registry.projects):
        one.ClearField("meta")
    return hashlib.sha256(registry.SerializeToString(deterministic=True)).hexdigest()


def _read_registry(folder: Path) -> Any:
    """A registry, which must hold no functions: Feast keeps them pickled, and reading a pickle may run anything."""
    path, registry = folder / _REGISTRY, Registry()
    try:
        registry.ParseFromString(path.read_bytes())
    except OSError:
        raise MissingInputError(
            f"feature store {folder}", expected="a folder with registry.db", got="none", remedy=_AGAIN
        ) from None
    except DecodeError:
        raise DataError(f"feature registry {path}", expected="Feast's", got="other bytes", remedy=_AGAIN) from None
    found = [view.spec.name for view in (*registry.on_demand_feature_views, *registry.stream_feature_views)]
    if found:
        raise DataError(
            f"feature registry {path}", expected="feature views without code", got=", ".join(found), remedy=_AGAIN
        )
    return registry


def create_feature_store(folder: Path, settings: Settings, version: str) -> FeatureStore:
    """Register the definitions of the Feast repository for a folder that holds the sources.

    `version` tells this run's store from others in the services of production: letters, digits and hyphens.

    Raises:
        ConfigError: The repository or the environment's feature_store.yaml is missing or wrong.
        UnavailableError: The registry of production does not answer.
    """
    definitions = vars(_load_definitions(settings.feature_repo_dir)).values()
    content = _read_configuration(settings)
    if settings.feature_environment == "production":
        content["project"] = f"{content['project']}_{version.replace('-', '_')}"
    store = _open(folder, settings, content)
    with _service_errors():
        store.apply([value for value in definitions if isinstance(value, (Entity, FeatureView, FeatureService))])
    return store


def materialize(store: FeatureStore, end: datetime, report: Report) -> None:
    """Copy each user's newest row to the online store, all known by `end`. Call within `offline`.

    By batches of the sources, whose rows stand by user and instant: Feast's own materialisation holds all users' rows
    at once, as Arrow and as protobuf (ADR 29). After this the folder holds the registry, whatever service keeps it.

    Raises:
        UnavailableError: The online store or the registry of production does not answer.
    """
    start = datetime.fromtimestamp(0, UTC)
    with _service_errors():
        for view in store.list_feature_views():
            progress = Progress(report, f"filling the online store, {view.name}", "users")
            for rows in _newest_rows(Path(f"{view.name}.parquet")):
                store.write_to_online_store(view.name, rows.to_pandas())
                progress.add(rows.num_rows)
            store.registry.apply_materialization(view, store.project, start, end)
        if not Path(_REGISTRY).exists():
            Path(_REGISTRY).write_bytes(_select_project(store.registry.proto(), store.project).SerializeToString())


def _newest_rows(source: Path) -> Iterator[pa.Table]:
    """The last row of every user, batch by batch."""
    with pq.ParquetFile(source) as file:
        waiting = file.schema_arrow.empty_table()
        for batch in file.iter_batches(batch_size=MATERIALIZE_ROWS):
            rows = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
            users = rows["user_id"].combine_chunks()
            is_last = pc.not_equal(users[:-1], users[1:])  # the newest of the batch's last user may come yet
            waiting = rows.slice(rows.num_rows - 1)
            if (last := rows.slice(0, rows.num_rows - 1).filter(is_last)).num_rows:
                yield last
        if waiting.num_rows:
            yield waiting


def remove_online_features(folder: Path, settings: Settings) -> None:
    """Remove a run's store from the services of production; its folder stays, and no release can be served with it.

    Not by Feast's own teardown, which removes every project of the registry.

    Raises:
        ConfigError: As `open_feature_store`.
        UnavailableError: A service does not answer.
    """
    written = open_feature_store(folder, settings)
    store = _open(folder, settings, {**_read_configuration(settings), "project": written.project})
    with _service_errors():
        online = get_online_store_from_config(store.config.online_store)
        online.teardown(store.config, written.list_feature_views(), written.list_entities())
        for view in store.list_feature_views():  # else its versions stay, and no run of this name could be registered
            store.registry.delete_feature_view(view.name, written.project)
        if written.project in [project.name for project in store.list_projects()]:
            store.registry.delete_project(written.project)


def materialized_until(store: FeatureStore) -> float:
    """Up to when the online store knows events, seconds since 1970; 0 if nothing was materialised."""
    ends = [end for view in store.list_feature_views() for _, end in view.materialization_intervals]
    return max(ends).timestamp() if ends else 0.0


def retrieve_features(store: FeatureStore, entities: pd.DataFrame) -> pa.Table:
    """Point-in-time features of (user_id, event_timestamp) rows, in any order. Call within `offline`."""
    service = store.get_feature_service(SERVICE)
    return store.get_historical_features(entity_df=entities, features=service).to_arrow()


@contextlib.contextmanager
def offline(folder: Path) -> Iterator[None]:
    """Let Feast find the sources: it takes their relative paths from the working directory, as its own CLI does.

    The working directory is the process's; do not use this beside threads that rely on it.
    """
    with contextlib.chdir(folder):
        yield


def read_history(store: FeatureStore, user_ids: Sequence[str], now: datetime) -> list[History]:
    """The newest known history of each user, in the order given, from the online store; empty for an unknown user.

    Ages are counted to `now`, an instant with a time zone.
    """
    if not user_ids:
        return []
    rows = [{"user_id": user_id} for user_id in user_ids]
    answer: dict[str, list[Any]] = store.get_online_features(
        features=store.get_feature_service(SERVICE, allow_cache=True), entity_rows=rows
    ).to_dict()
    now_us = round(now.timestamp() * 1e6)
    return [
        _history({name: column[index] for name, column in answer.items()}, now_us) for index in range(len(user_ids))
    ]


def _history(row: dict[str, Any], now_us: int) -> History:
    def days_since(last_us: int) -> float:
        return (now_us - last_us) / MICROSECONDS_A_DAY

    last_us = row["last_us"]
    return History(
        history_item_ids=row["history_item_ids"] or [],
        history_counts=row["history_counts"] or [],
        history_days_since=[days_since(value) for value in row["history_last_us"] or []],
        history_behaviors=row["history_behaviors"] or [],
        num_events=row["num_events"] or 0,
        num_items=row["num_items"] or 0,
        num_active_days=row["num_active_days"] or 0,
        days_since_last=0.0 if last_us is None else days_since(last_us),
        top_categories=row["top_categories"] or [],
    )


def _configuration(settings: Settings) -> Path:
    return settings.feature_repo_dir / settings.feature_environment / "feature_store.yaml"


def _read_configuration(settings: Settings) -> dict[str, Any]:
    """The environment's feature_store.yaml."""
    path = _configuration(settings)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"Feast configuration {path}",
            expected="a readable file",
            got=error.strerror,
            remedy="set URM_FEATURE_REPO_DIR to the folder feature_repo of this repository",
        ) from None
    except yaml.YAMLError as error:
        raise _invalid_configuration(path, error) from None
    if not isinstance(content, dict) or "project" not in content:
        raise _invalid_configuration(path, "none with a project")
    return content


def _open_written(folder: Path, settings: Settings, changes: dict[str, Any]) -> FeatureStore:
    """Open a store with the registry in its folder, and the project that it was written for."""
    projects = [project.spec.name for project in _read_registry(folder).projects]
    content = _read_configuration(settings)
    written_for = "embedded" if content["project"] in projects else "production"
    if written_for != settings.feature_environment:
        raise ConfigError(
            f"feature store {folder}",
            expected=f"one written for the environment {settings.feature_environment}",
            got=written_for,
            remedy="set URM_FEATURE_ENVIRONMENT to that, or run `urm features` with this one",
        )
    return _open(folder, settings, {**content, "project": projects[0], "registry": _REGISTRY_FILE, **changes})


def _open(folder: Path, settings: Settings, content: dict[str, Any]) -> FeatureStore:
    path, content = _configuration(settings), _expand(content)
    try:
        config = RepoConfig(**content)
        config.repo_path = folder.absolute()
        return FeatureStore(repo_path=str(folder.absolute()), config=config)
    except (FeastModuleImportError, ImportError) as error:
        raise ConfigError(
            f"Feast configuration {path}",
            expected="the packages of its stores",
            got=str(error),
            remedy="install the extras of feast that it names, e.g. feast[redis,postgres]",
        ) from None
    except (FeastError, ValueError) as error:
        raise _invalid_configuration(path, error) from None


def _expand(value: Any) -> Any:
    """Fill in the variables that a value of the configuration names.

    Raises:
        ConfigError: One is not set.
    """
    if isinstance(value, dict):
        return {key: _expand(each) for key, each in value.items()}
    if not isinstance(value, str):
        return value
    expanded = os.path.expandvars(value)
    if missing := re.search(r"\$\{(\w+)\}", expanded):
        raise ConfigError(
            f"setting {missing[1]}", expected="a value, which Feast's configuration names", got="none", remedy="set it"
        )
    return expanded


def _invalid_configuration(path: Path, got: object) -> ConfigError:
    return ConfigError(
        f"Feast configuration {path}",
        expected="a valid feature_store.yaml",
        got=" ".join(str(got).split()),
        remedy="fix the file",
    )


def _select_project(registry: Any, project: str) -> Any:
    """What a registry of many projects holds of one."""
    selected = Registry(registry_schema_version=registry.registry_schema_version)
    selected.last_updated.CopyFrom(registry.last_updated)
    selected.projects.extend(one for one in registry.projects if one.spec.name == project)
    selected.data_sources.extend(one for one in registry.data_sources if one.project == project)
    for kind in ("entities", "feature_views", "feature_services"):
        getattr(selected, kind).extend(one for one in getattr(registry, kind) if one.spec.project == project)
    return selected


@contextlib.contextmanager
def _service_errors() -> Iterator[None]:
    """Turn what the clients of production's services raise into one sentence."""
    from sqlalchemy.exc import SQLAlchemyError  # slow, and workers, which only read, do without it

    try:
        yield
    except (redis.RedisError, SQLAlchemyError) as error:
        service = "online store" if isinstance(error, redis.RedisError) else "registry"
        raise UnavailableError(
            f"feature store, its {service}",
            expected="an answer",
            got=getattr(error, "orig", error),  # SQLAlchemy's own message has the whole statement
            remedy="start it, or try again later",
        ) from error
    except ImportError as error:
        raise ConfigError(
            "feature store, its registry",
            expected="the driver of the database that FEAST_REGISTRY_URI names",
            got=error,
            remedy="install it, e.g. psycopg[binary]",
        ) from None


def _load_definitions(repository: Path) -> ModuleType:
    path = repository / "definitions.py"
    spec = importlib.util.spec_from_file_location("feature_repo_definitions", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(
            f"Feast definitions {path}",
            expected="a readable file",
            got="none",
            remedy="set URM_FEATURE_REPO_DIR to the folder feature_repo of this repository",
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
