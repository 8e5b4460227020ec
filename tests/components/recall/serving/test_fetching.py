"""A release fetched ahead of its workers, from a store that is away afterwards."""

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import redis

from components.exceptions import MissingInputError, ReleaseError
from components.features.store import hash_registry
from components.features.users import SOURCE, read_users
from components.recall.serving.catalogue import Catalogue, load_catalogue
from components.recall.serving.engine import load_release
from components.recall.serving.fetching import FetchedRelease, fetch_release, fill_cache, list_users
from components.release.bundle import hash_manifest, read_manifest, write_manifest
from components.release.publication import Publication
from components.settings import Settings
from tests.worlds.recall import Release, Store, store_release
from tests.worlds.servers import RedisServer
from tests.worlds.tiny import NUM_USERS, make_feature_store


@pytest.fixture
def store(releases: tuple[Release, Release], tmp_path: Path) -> Store:
    return store_release(releases[0], tmp_path / "store")


@pytest.fixture
def pod(releases: tuple[Release, Release], tmp_path: Path) -> Settings:
    """Settings with a cache of their own, in which a killed process has left parts."""
    for part in ("bundles/0123456789abcdef/.tmp-a/content", "features/.tmp-b"):
        (tmp_path / "cache" / part).mkdir(parents=True)
        (tmp_path / "cache" / part / "index.faiss").write_bytes(b"half")
    return releases[0].settings.model_copy(update={"cache_dir": str(tmp_path / "cache")})


def test_what_was_fetched_is_loaded_without_the_store(
    releases: tuple[Release, Release], store: Store, pod: Settings
) -> None:
    fetched = fill_cache(store.publication, pod)
    assert {path.parent.name for path in (fetched.bundle, fetched.features)} == {
        store.publication.manifest[:16],
        "features",
    }
    shutil.rmtree(store.folder)
    assert fill_cache(store.publication, pod) == fetched
    assert load_release(store.publication, pod, releases[0].config.release).name == releases[0].name
    assert not list(pod.cache_path.rglob(".tmp-*"))


def test_the_list_of_users_is_fetched_beside_what_workers_need(store: Store, pod: Settings) -> None:
    fetched = fill_cache(store.publication, pod)
    assert sorted(list_users(store.publication, pod)) == sorted(str(user) for user in range(NUM_USERS))
    assert not (fetched.features / SOURCE).exists()
    with pytest.raises(MissingInputError, match=f"users of feature store .*: expected {SOURCE}, got "):
        next(read_users(fetched.features))


def test_a_wrong_copy_is_refused_and_fetched_anew(store: Store, pod: Settings) -> None:
    index = store.folder / "bundle" / "index.faiss"
    content = index.read_bytes()
    index.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ReleaseError, match=r"file index\.faiss: expected SHA-256"):
        fill_cache(store.publication, pod)
    index.write_bytes(content)
    other = store.publication.model_copy(update={"manifest": "0" * 64})
    with pytest.raises(ReleaseError, match=r"file manifest\.json: expected SHA-256 000000000000…, as it was published"):
        fill_cache(other, pod)
    assert fill_cache(store.publication, pod).manifest.release == store.publication.release


@pytest.mark.parametrize("load", [load_catalogue, fetch_release])
def test_what_was_damaged_in_the_store_is_fetched_anew_once_it_is_repaired(
    store: Store, pod: Settings, load: Callable[[Publication, Settings], Catalogue | FetchedRelease]
) -> None:
    titles = store.folder / "bundle" / "titles.parquet"
    content = titles.read_bytes()
    titles.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(ReleaseError, match=r"file titles\.parquet: expected SHA-256"):
            load(store.publication, pod)
    titles.write_bytes(content)
    load(store.publication, pod)


def test_in_production_a_worker_fetches_the_registry_alone_and_reads_features_by_redis(
    releases: tuple[Release, Release],
    store: Store,
    pod: Settings,
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    users = [str(user) for user in range(NUM_USERS)]
    config = releases[0].config.release
    embedded = load_release(store.publication, pod, config).read_histories(users)
    production = pod.model_copy(update={"feature_environment": "production", "cache_dir": str(tmp_path / "new")})
    monkeypatch.setenv("FEAST_REGISTRY_URI", f"sqlite:///{tmp_path}/registry.sqlite")
    monkeypatch.setenv("FEAST_REDIS_ADDRESS", f"127.0.0.1:{redis_server.port},db=4")
    features, bundle = store.folder / "features", store.folder / "bundle"
    shutil.rmtree(features)
    make_feature_store(features, production)
    manifest = read_manifest(bundle).model_copy(update={"feature_registry": hash_registry(features)})
    write_manifest(bundle, manifest)
    publication = store.publication.model_copy(update={"manifest": hash_manifest(bundle)})

    monkeypatch.delenv("FEAST_REGISTRY_URI")
    fetched = fill_cache(publication, production)
    assert [path.name for path in fetched.features.iterdir()] == ["registry.db"]
    served = load_release(publication, production, config)
    assert served.read_histories(users) == embedded
    assert all(history.num_events for history in embedded.values())

    with closing(redis.Redis(port=redis_server.port, db=4)) as features_redis:
        features_redis.flushdb()
    with pytest.raises(
        ReleaseError, match=r"online features of release .*: expected a history of at least one of 3 users"
    ):
        load_release(publication, production, config)
