"""The Feast store of a run: opened in place, filled by the features stage, read online by the recall worker.

Everything lies in one folder with relative paths inside (`feature_repo/<environment>/feature_store.yaml`), so the
folder may be renamed, moved or copied as a whole.
"""

import contextlib
import hashlib
import importlib.util
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
import yaml
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from components.exceptions import ConfigError, DataError, MissingInputError
from components.features.feast import (
    Entity,
    FeastConfigError,
    FeastError,
    FeastModuleImportError,
    FeatureService,
    FeatureStore,
    FeatureView,
    Registry,
)
from components.settings import Settings

SERVICE = "user_history"
_AGAIN = "run `urm features` again"
# Feast loads the class of the offline store whenever it opens a store; this one needs no package and is never asked.
_NO_OFFLINE_STORE = {"type": "remote", "host": "none"}
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


def open_feature_store(folder: Path, settings: Settings, configuration: Path | None = None) -> FeatureStore:
    """Open the store that the features stage left: its output `feature_store`, or a copy of it.

    Production does not read the folder: there the registry and the stores are the services that feature_store.yaml
    names.

    Args:
        folder: The store.
        settings: Where the Feast repository is.
        configuration: A feature_store.yaml; that of the environment if left out.

    Raises:
        MissingInputError: The folder holds no registry.
        DataError: The registry holds code.
        ConfigError: The environment's feature_store.yaml is missing or wrong, or the packages it needs are.
    """
    if settings.feature_environment == "embedded":
        _read_registry(folder / "registry.db")
    return _open(folder, configuration or _configuration(settings))


def open_online_store(folder: Path, settings: Settings) -> FeatureStore:
    """As `open_feature_store`, for online reads alone: the packages of the offline store need not be there.

    Raises:
        MissingInputError: As `open_feature_store`.
        DataError: As `open_feature_store`.
        ConfigError: As `open_feature_store`.
    """
    path = _configuration(settings)
    with tempfile.TemporaryDirectory() as temporary:
        changed = Path(temporary) / path.name
        try:
            content = yaml.safe_load(path.read_text())
            changed.write_text(yaml.safe_dump({**content, "offline_store": _NO_OFFLINE_STORE}))
        except (OSError, yaml.YAMLError, TypeError):
            changed = path  # opening it says what is wrong
        return open_feature_store(folder, settings, changed)


def hash_registry(folder: Path) -> str:
    """SHA-256 of what a store's registry defines; materialising features does not change it.

    Raises:
        MissingInputError: The folder holds no registry.
        DataError: The registry is none, or holds code.
    """
    registry = _read_registry(folder / "registry.db")
    registry.ClearField("last_updated")
    registry.ClearField("version_id")
    for one in (*registry.entities, *registry.feature_views, *registry.feature_services, *registry.projects):
        one.ClearField("meta")
    return hashlib.sha256(registry.SerializeToString(deterministic=True)).hexdigest()


def _read_registry(path: Path) -> Any:
    """A registry, which must hold no functions: Feast keeps them pickled, and reading a pickle may run anything."""
    registry = Registry()
    try:
        registry.ParseFromString(path.read_bytes())
    except OSError:
        raise MissingInputError(
            f"feature store {path.parent}", expected="a folder with registry.db", got="none", remedy=_AGAIN
        ) from None
    except DecodeError:
        raise DataError(f"feature registry {path}", expected="Feast's", got="other bytes", remedy=_AGAIN) from None
    found = [view.spec.name for view in (*registry.on_demand_feature_views, *registry.stream_feature_views)]
    if found:
        raise DataError(
            f"feature registry {path}", expected="feature views without code", got=", ".join(found), remedy=_AGAIN
        )
    return registry


def create_feature_store(folder: Path, settings: Settings) -> FeatureStore:
    """Register the definitions of the Feast repository for a folder that holds the sources.

    Raises:
        ConfigError: The repository or the environment's feature_store.yaml is missing or wrong.
    """
    definitions = vars(_load_definitions(settings.feature_repo_dir)).values()
    store = _open(folder, _configuration(settings))
    store.apply([value for value in definitions if isinstance(value, (Entity, FeatureView, FeatureService))])
    return store


def materialize(store: FeatureStore, end: datetime) -> None:
    """Copy each user's newest row known by `end` to the online store. Call within `offline`."""
    said = io.StringIO()  # Feast reports progress by print and tqdm
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        store.materialize(start_date=datetime.fromtimestamp(0, UTC), end_date=end)


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


def _open(folder: Path, path: Path) -> FeatureStore:
    try:
        return FeatureStore(repo_path=str(folder.absolute()), fs_yaml_file=path)
    except OSError as error:
        raise ConfigError(
            f"Feast configuration {path}",
            expected="a readable file",
            got=error.strerror,
            remedy="set URM_FEATURE_REPO_DIR to the folder feature_repo of this repository",
        ) from None
    except FeastModuleImportError as error:
        raise ConfigError(
            f"Feast configuration {path}",
            expected="the packages of its stores",
            got=str(error),
            remedy="install the extras of feast that it names, e.g. feast[spark,redis,postgres]",
        ) from None
    except (FeastConfigError, FeastError) as error:
        raise ConfigError(
            f"Feast configuration {path}",
            expected="a valid feature_store.yaml",
            got=" ".join(str(error).split()),
            remedy="fix the file",
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
