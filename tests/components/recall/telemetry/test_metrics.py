"""What a worker's page of metrics says, against what it was given."""

import re
import time
from collections.abc import Callable

import numpy as np
import pytest
import redis
from prometheus_client import generate_latest

from components.config import RecallConfig
from components.recall.operate.intake import feed
from components.recall.serving.context import build_context
from components.recall.serving.engine import load_release
from components.recall.state.scripts import STREAM
from components.recall.state.stream import EventStream
from components.recall.telemetry.metrics import AdHocMetrics, StreamMetrics, WorkerMetrics
from components.recall.worker.stream import RecallWorker
from components.release.publication import Publication
from components.urm.data.request import RecallRequest
from tests.worlds.recall import Release, StartWorker, make_event, wait_until


@pytest.fixture
def quick_housekeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.recall.worker.stream._MAINTENANCE_SECONDS", 0.05)


def reader(worker: RecallWorker) -> Callable[..., float]:
    def read(name: str, **labels: str) -> float:
        value = worker.metrics.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value

    return read


def test_events_are_counted_by_how_they_join_the_history(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig
) -> None:
    read = reader(promoted[0])
    first = [make_event(minutes=minute, event_id=f"e{minute}") for minute in (60, 70)]
    unknown = make_event("5", item_id=999_999, event_id="unknown")
    feed(client, iter([*first, unknown]), recall_config)
    wait_until(lambda: read("urm_worker_events_total", outcome="done") == 3)
    client.xadd(STREAM, {"event": first[0].model_dump_json()})  # as an entry that is delivered again
    feed(client, iter([make_event(minutes=65, event_id="late")]), recall_config)
    wait_until(lambda: read("urm_worker_events_total", outcome="done") == 5)
    assert read("urm_worker_history_events_total", how="in_order") == 3
    assert read("urm_worker_history_events_total", how="late") == 1
    assert read("urm_worker_history_events_total", how="repeated") == 1
    assert read("urm_worker_unknown_items_total") == 1
    assert read("urm_event_to_visible_seconds_count") == 4  # the one fed by hand does not say when it was accepted
    assert read("urm_worker_tokens_total") > 0
    for part in ("history", "inference", "store"):
        assert read("urm_worker_stage_seconds_count", part=part) == read("urm_worker_batch_users_count")


@pytest.mark.usefixtures("quick_housekeeping")
def test_gauges_tell_what_lags_from_what_is_pending(
    client: redis.Redis, start_worker: StartWorker, recall_config: RecallConfig
) -> None:
    worker = start_worker()  # without a release it takes nothing
    wait_until(lambda: worker.metrics.registry.get_sample_value("urm_stream_entries") is not None)
    read = reader(worker)
    feed(client, iter([make_event(event_id=f"e{number}") for number in range(5)]), recall_config)
    fed_at = time.monotonic()
    wait_until(lambda: read("urm_stream_entries") == 5)
    assert read("urm_stream_lag_entries") == 5
    EventStream(client, "another", recall_config).read(2, 10)
    wait_until(lambda: read("urm_stream_pending_entries") == 2)
    wait_until(lambda: read("urm_stream_lag_entries") == 3)
    assert read("urm_stream_entries") == 5
    wait_until(lambda: read("urm_stream_oldest_entry_age_seconds") > 0.5)
    assert read("urm_stream_oldest_entry_age_seconds") <= time.monotonic() - fed_at + 1
    client.delete(STREAM)
    wait_until(lambda: read("urm_stream_entries") == 0)
    wait_until(lambda: read("urm_stream_oldest_entry_age_seconds") == 0)
    assert read("urm_redis_memory_bytes") > 100_000
    assert read("urm_redis_memory_limit_bytes") == 0


@pytest.mark.parametrize("metrics", [StreamMetrics(), AdHocMetrics()], ids=["stream", "ad_hoc"])
def test_a_worker_that_has_not_looked_says_nothing_of_stream_and_redis(metrics: WorkerMetrics) -> None:
    assert not re.search(r"^urm_(stream|dead|redis)", generate_latest(metrics.registry).decode(), re.MULTILINE)


@pytest.mark.usefixtures("quick_housekeeping")
def test_gauges_end_with_the_last_look(
    client: redis.Redis, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start_worker()
    get = worker.metrics.registry.get_sample_value
    wait_until(lambda: get("urm_redis_saves") == 1)
    seen = worker.metrics.seen
    monkeypatch.setattr("components.recall.telemetry.metrics.STALE_SECONDS", -1.0)  # as long after the last look
    assert seen.at > 0 and get("urm_stream_entries") is None and get("urm_redis_memory_bytes") is None


def test_a_write_that_failed_is_seen() -> None:
    metrics = StreamMetrics()
    for state in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status"):
        metrics.note_redis({"used_memory": 1, "maxmemory": 0}, {state: "err"})
        assert metrics.registry.get_sample_value("urm_redis_saves") == 0
    metrics.note_redis({"used_memory": 1, "maxmemory": 0}, {})
    assert metrics.registry.get_sample_value("urm_redis_saves") == 1


def test_ages_of_release_and_features_are_known(promoted: tuple[RecallWorker, Publication]) -> None:
    get = promoted[0].metrics.registry.get_sample_value
    assert time.time() - 86_400 < get("urm_worker_release_created_timestamp_seconds") <= time.time()
    assert 0 < get("urm_worker_features_until_timestamp_seconds") <= time.time()


@pytest.mark.usefixtures("quick_housekeeping")
def test_worker_waits_while_redis_is_full(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig
) -> None:
    read = reader(promoted[0])
    feed(client, iter([make_event(event_id="before")]), recall_config)
    wait_until(lambda: client.xlen(STREAM) == 0)
    try:
        client.config_set("maxmemory", 1)
        time.sleep(1)  # several turns
    finally:
        client.config_set("maxmemory", 0)
    feed(client, iter([make_event(minutes=70, event_id="after")]), recall_config)
    wait_until(lambda: read("urm_worker_events_total", outcome="done") == 2)


def test_tokens_of_a_shared_prefix_count_once(releases: tuple[Release, Release]) -> None:
    publication = Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1)
    release = load_release(publication, releases[0].settings, releases[0].config.release)
    context = build_context(release.read_histories(["3"])["3"], [make_event()], release.rule)

    def count(*tasks: int) -> int:
        before = release.num_tokens
        release.recommend([RecallRequest(context, release.tasks[task]) for task in tasks], 5)
        return release.num_tokens - before

    places = np.arange(len(context.item_ids))
    prefix = len(release.recaller.builder.writer.prefix(context, places).token_ids)
    assert count(0) > prefix > 0
    assert count(0, 1) == count(0) + count(1) - prefix
