"""Offline and online features agree, wherever the folder lies."""

import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pytest

from components.exceptions import ConfigError, DataError, MissingInputError
from components.features.contexts import retrieve_contexts
from components.features.feast import Registry
from components.features.log import read_log
from components.features.sources import write_sources
from components.features.store import (
    History,
    create_feature_store,
    hash_registry,
    materialize,
    offline,
    open_feature_store,
    read_history,
)
from components.settings import Settings
from tests.worlds import run_python
from tests.worlds.logs import START, Event, make_config, write_events, write_items

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
def folder(engine: ibis.BaseBackend, tmp_path: Path, settings: Settings) -> Path:
    """A filled feature store, moved after it was written, as a stage's output is."""
    features = make_config(history_length=7).features
    written, moved = tmp_path / ".tmp-written", tmp_path / "moved" / "feature_store"
    written.mkdir()
    moved.parent.mkdir()
    items = engine.read_parquet(str(write_items(tmp_path / "items.parquet", CATEGORIES)))
    log = read_log(engine, write_events(tmp_path / "events", EVENTS), features.split, [])
    write_sources(log, items, features, written)
    store = create_feature_store(written, settings)
    with offline(written):
        materialize(store, end=LATE)
    written.rename(moved)
    return moved


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


@pytest.mark.parametrize("open_", [create_feature_store, open_feature_store])
def test_a_missing_repository_is_refused(
    open_: Callable[[Path, Settings], object], folder: Path, tmp_path: Path, settings: Settings
) -> None:
    elsewhere = settings.model_copy(update={"feature_repo_dir": tmp_path / "nowhere"})
    with pytest.raises(ConfigError, match=r"nowhere.*set URM_FEATURE_REPO_DIR"):
        open_(folder, elsewhere)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("project: 'not a name!'\nregistry: registry.db\n", r"expected a valid feature_store\.yaml"),
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
        materialize(open_feature_store(folder, settings), end=LATE + DAY)
    assert hash_registry(folder) == before
    registry = Registry()
    registry.ParseFromString((folder / "registry.db").read_bytes())
    registry.feature_views[0].spec.batch_source.file_options.uri = "/elsewhere.parquet"
    (folder / "registry.db").write_bytes(registry.SerializeToString())
    assert hash_registry(folder) != before
