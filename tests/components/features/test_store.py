"""Offline and online features agree, wherever the folder lies."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pytest
import redis

from components.exceptions import ConfigError, DataError, MissingInputError, UnavailableError
from components.features.contexts import retrieve_contexts
from components.features.feast import Registry
from components.features.log import read_log
from components.features.sources import write_sources
from components.features.store import (
    History,
    create_feature_store,
    hash_registry,
    materialize,
    materialized_until,
    offline,
    online_files,
    open_feature_store,
    open_online_store,
    read_history,
    remove_online_features,
)
from components.settings import Settings
from tests.worlds import run_python
from tests.worlds.logs import START, Event, make_config, write_events, write_items
from tests.worlds.servers import RedisServer

DAY = timedelta(days=1)
CATEGORIES = {item: ["FOOD", f"CATEGORY {item % 3}"] for item in range(12)}
EVENTS = [
    Event(user, (number * step) % 12, START + number * timedelta(hours=11) - 9 * DAY, behavior=behavior)
    for user, step, behavior in (("a", 5, "purchase"), ("b", 7, "click"))
    for number in range(50)
] + [Event("c", 3, START)]
USERS = ["a", "b", "c"]
LATE = max(event.ts for event in EVENTS) + 3 * DAY


@pytest.fixture
def fill(engine: ibis.BaseBackend, tmp_path: Path) -> Callable[..., Path]:
    """Fill a feature store, and move it after it was written, as a stage's output is."""
    items = engine.read_parquet(str(write_items(tmp_path / "items.parquet", CATEGORIES)))

    def fill(settings: Settings, version: str = "a", events: Sequence[Event] = EVENTS) -> Path:
        features = make_config(history_length=7).features
        written, moved = tmp_path / ".tmp-written", tmp_path / f"moved-{version}" / "feature_store"
        written.mkdir()
        moved.parent.mkdir()
        folder = write_events(tmp_path / f"events-{version}", events)
        log = read_log(engine, folder, features.split, [], tmp_path / f"log-{version}", print)
        write_sources(log, items, features, written, print)
        store = create_feature_store(written, settings, version)
        with offline(written):
            materialize(store, end=LATE, report=print)
        written.rename(moved)
        return moved

    return fill


@pytest.fixture
def folder(fill: Callable[..., Path], settings: Settings) -> Path:
    return fill(settings)


@pytest.fixture
def production(
    settings: Settings, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """Settings of production, with a registry in SQL and an online store in Redis."""
    monkeypatch.setenv("FEAST_REGISTRY_URI", f"sqlite:///{tmp_path}/registry.sqlite")
    monkeypatch.setenv("FEAST_REDIS_ADDRESS", f"127.0.0.1:{redis_server.port},db=3")
    with closing(redis.Redis(port=redis_server.port, db=3)) as client:
        client.flushdb()
    yield settings.model_copy(update={"feature_environment": "production"})


def retrieve_offline(folder: Path, settings: Settings, at: datetime) -> list[History]:
    store = open_feature_store(folder, settings)
    chosen = pa.table({"context_id": [0, 1, 2], "user_id": USERS, "cut_ts": [at] * 3, "split": ["test"] * 3})
    with offline(folder):
        rows = retrieve_contexts(store, chosen).to_pylist()
    fields = History.__dataclass_fields__
    return [History(**{name: value for name, value in row.items() if name in fields}) for row in rows]


def assert_agree(online: list[History], offline_: list[History]) -> None:
    for one, other in zip(online, offline_, strict=True):
        np.testing.assert_allclose(one.history_days_since, other.history_days_since, rtol=1e-6)
        assert one.days_since_last == pytest.approx(other.days_since_last)
        for name in set(History.__dataclass_fields__) - {"history_days_since", "days_since_last"}:
            assert getattr(one, name) == getattr(other, name), name


def test_online_agrees_with_point_in_time_retrieval_after_the_last_event(folder: Path, settings: Settings) -> None:
    online = read_history(open_feature_store(folder, settings), USERS, LATE)
    assert_agree(online, retrieve_offline(folder, settings, LATE))
    assert [history.num_events for history in online] == [50, 50, 1]
    assert [len(history.history_item_ids) for history in online] == [7, 7, 1]
    assert online[2].history_days_since == [pytest.approx((LATE - START) / DAY)]


def test_a_copy_answers_like_the_original(folder: Path, settings: Settings, tmp_path: Path) -> None:
    before = read_history(open_feature_store(folder, settings), USERS, LATE)
    copy = tmp_path / "elsewhere" / "store"
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    assert read_history(open_feature_store(copy, settings), USERS, LATE) == before
    assert_agree(before, retrieve_offline(copy, settings, LATE))


ONLINE_ALONE = """
import sys
from datetime import datetime
from pathlib import Path

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dask", "duckdb", "ibis", "pyspark", "sqlglot"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
from components.features.store import open_online_store, read_history
from components.settings import Settings

store = open_online_store(Path(sys.argv[1]), Settings(feature_repo_dir=sys.argv[2]))
now = datetime.fromisoformat("2100-01-01T00:00Z")
print([history.num_events for history in read_history(store, sys.argv[3:], now)])
"""


def test_a_worker_reads_without_the_packages_of_the_offline_store(folder: Path, settings: Settings) -> None:
    done = run_python("-W", "ignore", "-c", ONLINE_ALONE, folder, settings.feature_repo_dir, *USERS)
    assert (done.stdout, done.stderr) == ("[50, 50, 1]\n", "")


def copy_online(folder: Path, target: Path, settings: Settings) -> Path:
    """A folder as a worker fetches it."""
    target.mkdir()
    for name in online_files(settings):
        shutil.copy(folder / name, target)
    return target


def test_in_production_workers_need_redis_and_the_registry_of_the_run(
    fill: Callable[..., Path], production: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(production)
    monkeypatch.delenv("FEAST_REGISTRY_URI")
    store = open_online_store(copy_online(folder, tmp_path / "worker", production), production)
    assert [path.name for path in (tmp_path / "worker").iterdir()] == ["registry.db"]
    online = read_history(store, ["nobody", *USERS], LATE)
    assert online[0] == History([], [], [], [], 0, 0, 0, 0.0, [])
    assert_agree(online[1:], retrieve_offline(folder, production, LATE))
    assert [history.num_events for history in online[1:]] == [50, 50, 1]
    assert materialized_until(store) == LATE.timestamp()
    assert len(hash_registry(folder)) == 64


def test_a_variable_that_is_not_set_is_named(
    fill: Callable[..., Path], production: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEAST_REGISTRY_URI")
    expected = "setting FEAST_REGISTRY_URI: expected a value, which Feast's configuration names, got none; set it."
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        fill(production)


def test_a_new_run_changes_nothing_that_an_earlier_release_reads(
    fill: Callable[..., Path], production: Settings, redis_server: RedisServer
) -> None:
    def counts(folder: Path) -> list[int]:
        histories = read_history(open_online_store(folder, production), USERS, LATE)
        return [history.num_events for history in histories]

    later = [*EVENTS, Event("c", 4, START + DAY)]
    one, two = fill(production, "a"), fill(production, "b-20260101", later)
    assert (counts(one), counts(two)) == ([50, 50, 1], [50, 50, 2])
    client = redis.Redis(port=redis_server.port, db=3)
    assert client.dbsize() == 2 * len(USERS)

    for _ in range(2):  # of which the second finds nothing
        remove_online_features(two, production)
    assert (counts(one), counts(two)) == ([50, 50, 1], [0, 0, 0])
    assert client.dbsize() == len(USERS)
    client.close()
    shutil.rmtree(two.parent)
    again = fill(production, "b-20260101", later)  # what is left of a run does not hinder its next attempt
    assert counts(again) == [50, 50, 2]
    with pytest.raises(ConfigError, match=r"expected one written for the environment embedded, got production; set"):
        open_online_store(one, production.model_copy(update={"feature_environment": "embedded"}))


def test_an_attempt_after_a_killed_one_writes_what_is_missing(
    fill: Callable[..., Path], production: Settings, redis_server: RedisServer
) -> None:
    folder = fill(production)
    with closing(redis.Redis(port=redis_server.port, db=3)) as client:
        client.delete(*client.keys("*user_id*")[:1])
    shutil.rmtree(folder.parent)
    folder = fill(production)
    online = read_history(open_online_store(folder, production), USERS, LATE)
    assert [history.num_events for history in online] == [50, 50, 1]


@pytest.mark.parametrize(
    ("variable", "value", "error", "message"),
    [
        ("FEAST_REDIS_ADDRESS", "", ConfigError, "setting FEAST_REDIS_ADDRESS: expected a value.*got none; set it"),
        ("FEAST_REDIS_ADDRESS", "127.0.0.1:1", UnavailableError, "feature store, its online store: expected an answer"),
        ("FEAST_REGISTRY_URI", "sqlite:////no/such/file", UnavailableError, "feature store, its registry: expected an"),
        ("FEAST_REGISTRY_URI", "postgresql+psycopg://u:secret@h/f", ConfigError, "driver of the database.*psycopg"),
    ],
)
def test_a_service_of_production_that_cannot_be_used_is_one_sentence(
    fill: Callable[..., Path],
    production: Settings,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setenv(variable, value)
    if not value:
        monkeypatch.delenv(variable)
    with pytest.raises(error, match=message) as raised:
        fill(production)
    assert "secret" not in str(raised.value)


def test_earlier_instants_see_less_offline(folder: Path, settings: Settings) -> None:
    early, late = (retrieve_offline(folder, settings, at) for at in (START + DAY, LATE))
    assert 0 < early[0].num_events < late[0].num_events


def test_unknown_users_have_an_empty_history_and_order_is_kept(folder: Path, settings: Settings) -> None:
    store = open_feature_store(folder, settings)
    histories = read_history(store, ["nobody", "c", "a"], LATE)
    assert histories[0] == History([], [], [], [], 0, 0, 0, 0.0, [])
    assert [history.num_events for history in histories] == [0, 1, 50]
    assert read_history(store, [], LATE) == []


def test_a_folder_without_a_registry_is_refused(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(MissingInputError, match=r"folder with registry\.db, got none; run `urm features` again"):
        open_feature_store(tmp_path, settings)


@pytest.mark.parametrize("open_", [partial(create_feature_store, version="a"), open_feature_store])
def test_a_missing_repository_is_refused(
    open_: Callable[[Path, Settings], object], folder: Path, tmp_path: Path, settings: Settings
) -> None:
    elsewhere = settings.model_copy(update={"feature_repo_dir": tmp_path / "nowhere"})
    with pytest.raises(ConfigError, match=r"nowhere.*set URM_FEATURE_REPO_DIR"):
        open_(folder, elsewhere)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "project: urm\nprovider: local\nentity_key_serialization_version: many\n",
            r"expected a valid feature_store\.yaml",
        ),
        (
            "project: urm\nprovider: local\nregistry: registry.db\noffline_store:\n  type: no.such.OfflineStore\n",
            "the packages of its stores, got .*no.such.*install",
        ),
    ],
)
def test_a_feast_configuration_that_cannot_be_used_is_refused(
    folder: Path, tmp_path: Path, settings: Settings, content: str, message: str
) -> None:
    path = tmp_path / "repository" / "embedded" / "feature_store.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        open_feature_store(folder, settings.model_copy(update={"feature_repo_dir": tmp_path / "repository"}))


def test_a_registry_with_code_is_refused_before_it_is_unpickled(folder: Path, settings: Settings) -> None:
    registry = Registry()
    registry.ParseFromString((folder / "registry.db").read_bytes())
    view = registry.on_demand_feature_views.add()
    view.spec.name, view.spec.project = "guess", "urm"
    view.spec.feature_transformation.user_defined_function.body = b"cos\nsystem\n(S'touch pickled'\ntR."
    (folder / "registry.db").write_bytes(registry.SerializeToString())
    with pytest.raises(DataError, match=r"registry\.db: expected feature views without code, got guess"):
        open_feature_store(folder, settings)
    (folder / "registry.db").write_bytes(b"no registry")
    with pytest.raises(DataError, match=r"registry\.db: expected Feast's, got other bytes"):
        open_feature_store(folder, settings)


def test_the_digest_of_a_registry_is_that_of_its_definitions(folder: Path, settings: Settings) -> None:
    before = hash_registry(folder)
    with offline(folder):
        materialize(open_feature_store(folder, settings), end=LATE + DAY, report=print)
    assert hash_registry(folder) == before
    registry = Registry()
    registry.ParseFromString((folder / "registry.db").read_bytes())
    registry.feature_views[0].spec.batch_source.file_options.uri = "/elsewhere.parquet"
    (folder / "registry.db").write_bytes(registry.SerializeToString())
    assert hash_registry(folder) != before
