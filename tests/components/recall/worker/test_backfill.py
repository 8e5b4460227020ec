"""The back-fill on a real Redis, with releases of the tiny world: twelve users, none of whom has a result."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import yaml
from fastapi.testclient import TestClient

from components.config import ItemFilter, RecallConfig
from components.exceptions import ReleaseError
from components.features.users import read_users
from components.recall.operate.forget import forget_user
from components.recall.serving.engine import Ranking, ServingRelease, load_release
from components.recall.serving.fetching import list_users
from components.recall.state.backfill import read_progress, read_shard, save_progress
from components.recall.state.scripts import STREAM, result_key
from components.recall.state.store import Result, UserStore
from components.recall.worker.backfill import Backfill, choose_shard
from components.recall.worker.loop import SickWorkerError
from components.recall.worker.stream import RecallWorker
from components.redis_client import open_redis
from components.release.publication import SERVING, Publication, send_heartbeat
from components.urm.data.request import RecallRequest
from tests.worlds import REPOSITORY, wait_until
from tests.worlds.recall import POISON_ITEM, Loader, Release, add_history, make_event, serve_release
from tests.worlds.tiny import NUM_USERS, make_config

USERS = [str(user) for user in range(NUM_USERS)]
TASKS = ["next_purchase", "new_item"]
Make = Callable[..., Backfill]


@pytest.fixture
def make(client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig) -> Make:
    """Makes back-fills; the first release serves."""
    serve_release(client, releases[0], order=5)

    def load(publication: Publication) -> ServingRelease:
        return load_release(publication, releases[0].settings, releases[0].config.release)

    def make(
        shard: int = 0,
        shards: int = 1,
        rate: float = 0.0,
        load: Loader = load,
        config: RecallConfig = recall_config,
    ) -> Backfill:
        users, connection = (
            partial(list_users, settings=releases[0].settings),
            open_redis(releases[0].settings.redis_url),
        )
        return Backfill(connection, config, load, users, shard, shards, rate)

    return make


def results(client: redis.Redis, config: RecallConfig) -> dict[str, Result]:
    """Of the first task, by user."""
    found = {user: UserStore(client, config).result(user, TASKS[0]) for user in USERS}
    return {user: result for user, result in found.items() if result is not None}


class Interrupted(ServingRelease):
    """Calls `before` when it is about to compute."""

    before: Callable[[], object]

    def recommend(self, requests: Sequence[RecallRequest], k: int) -> list[Ranking]:
        type(self).before()
        return super().recommend(requests, k)


def interrupt(release: Release, before: Callable[[], object]) -> Loader:
    """Loads a release that calls `before` the first time it computes, after its smoke check."""
    calls = iter([before])

    class Once(Interrupted):
        @staticmethod
        def before() -> None:
            next(calls, lambda: None)()

    def load(publication: Publication) -> ServingRelease:
        return Once(**vars(load_release(publication, release.settings, release.config.release)))

    return load


def test_every_known_user_has_results_with_which_reads_answer(
    client: redis.Redis, make: Make, api: TestClient, releases: tuple[Release, Release], recall_config: RecallConfig
) -> None:
    serve_release(client, releases[0], order=5)
    assert api.get("/v1/users/3/recall").json()["source"] == "fallback"
    backfill = make()
    backfill.run()
    assert backfill.finished
    for user in USERS:
        for task in TASKS:
            assert 0 < client.ttl(result_key(user, task)) <= recall_config.result_ttl_seconds
    body = api.get("/v1/users/3/recall").json()
    assert (body["source"], body["release"], body["event_id"]) == ("model", releases[0].name, None)
    (progress,) = read_progress(client, 5)
    assert (progress.done, progress.total, progress.stored, progress.finished) == (12, 12, 12, True)
    count = backfill.metrics.registry.get_sample_value
    assert count("urm_backfill_users_total", {"outcome": "stored"}) == 12
    assert (count("urm_backfill_shard_users"), count("urm_backfill_shard_users_done")) == (12, 12)


def test_a_shard_that_began_long_ago_starts_over(client: redis.Redis, make: Make, recall_config: RecallConfig) -> None:
    """The results of its first users may have expired, which its place in the list does not know."""
    backfill = make()
    while len(results(client, recall_config)) < 8:
        backfill.step()
    progress = read_shard(client, 5, 0, 1)
    assert progress is not None and not progress.finished and progress.done >= 8
    progress.started_at -= recall_config.result_ttl_seconds / 2
    save_progress(client, 5, progress, recall_config.result_ttl_seconds)
    for task in TASKS:
        client.delete(result_key(USERS[0], task))
    make().run()
    assert set(results(client, recall_config)) == set(USERS)


@pytest.mark.parametrize("change", [{"k": 5}, {"filters": {"all": ItemFilter(deny_categories=("shelf 0",))}}])
def test_what_other_filters_or_another_k_had_chosen_is_computed_anew(
    client: redis.Redis, make: Make, recall_config: RecallConfig, change: dict[str, object]
) -> None:
    make().run()
    changed = recall_config.model_copy(update=change)
    backfill = make(config=changed)
    backfill.run()
    (progress,) = read_progress(client, 5)
    assert (progress.stored, progress.current) == (12, 0)
    make(config=changed).run()
    (progress,) = read_progress(client, 5)
    assert (progress.stored, progress.current) == (0, 12)
    make().run()  # and back
    (progress,) = read_progress(client, 5)
    assert (progress.stored, progress.current) == (12, 0)


def test_results_of_searches_are_kept_alive_with_the_others(
    client: redis.Redis, make: Make, recall_config: RecallConfig
) -> None:
    make().run()
    key, other = result_key("3", "text_query"), result_key("4", "text_query")
    choice = UserStore(client, recall_config).choice
    for name, order in ((key, 5), (other, 4)):  # of this publication, and of an earlier one
        client.hset(name, mapping={"body": "found", "release_order": order, "choice": choice})
        client.expire(name, 60)
    make().run()
    (progress,) = read_progress(client, 5)
    assert (progress.stored, progress.current) == (0, 12)
    assert client.ttl(key) > 60 >= client.ttl(other)
    assert not client.exists(result_key("5", "text_query"))


def test_an_event_after_the_back_fill_wins_however_old_it_is(
    client: redis.Redis, make: Make, recall_config: RecallConfig, start_worker: Callable[..., RecallWorker]
) -> None:
    make().run()
    start_worker()
    event = make_event("3", minutes=-600)  # older than what the features know
    client.xadd(STREAM, {"event": event.model_dump_json()})
    wait_until(lambda: results(client, recall_config)["3"].event_id == event.event_id)


def test_an_event_during_the_back_fill_wins_and_the_user_is_computed_with_it(
    client: redis.Redis, make: Make, recall_config: RecallConfig, releases: tuple[Release, Release]
) -> None:
    event = make_event("2")
    backfill = make(load=interrupt(releases[0], lambda: add_history(client, recall_config, [event])))
    backfill.run()
    assert results(client, recall_config)["2"].event_id == event.event_id
    fields = client.hmget(result_key("2", TASKS[0]), "event_ts_us", "revision", "release_order")
    assert fields == [str(event.ts_us), "1", "5"]


def test_a_live_result_of_the_release_stays_and_one_of_an_earlier_release_is_computed_again(
    client: redis.Redis, make: Make, recall_config: RecallConfig, releases: tuple[Release, Release]
) -> None:
    event = make_event("4")
    add_history(client, recall_config, [event])
    for user, order in (("4", 4), ("7", 5)):
        for task in TASKS:
            numbers = {"event_ts_us": event.ts_us if user == "4" else 1, "revision": 1, "release_order": order}
            client.hset(result_key(user, task), mapping={**numbers, "body": f"of {user}"})
    make().run()
    assert results_of(client, "7") == ["of 7", "of 7"]
    body = json.loads(results_of(client, "4")[0])
    assert (body["release"], body["event_id"]) == (releases[0].name, event.event_id)
    (progress,) = read_progress(client, 5)
    assert (progress.stored, progress.current) == (11, 1)


@pytest.mark.parametrize("history", [True, False])
def test_results_of_a_later_release_that_serves_no_more_are_computed_again(
    client: redis.Redis, make: Make, recall_config: RecallConfig, releases: tuple[Release, Release], history: bool
) -> None:
    event = make_event("4")
    if history:
        add_history(client, recall_config, [event])
    numbers = {"event_ts_us": event.ts_us, "revision": 1, "release_order": 6}
    for task in TASKS:  # as a worker of the withdrawn release left it
        client.hset(result_key("4", task), mapping={**numbers, "body": "withdrawn"})
    make().run()
    body = json.loads(results_of(client, "4")[1])
    assert (body["release"], body["event_id"]) == (releases[0].name, event.event_id if history else None)
    (progress,) = read_progress(client, 5)
    assert (progress.stored, progress.current) == (12, 0)


def test_what_knows_more_of_a_user_stays_whatever_serves(
    client: redis.Redis, make: Make, recall_config: RecallConfig
) -> None:
    add_history(client, recall_config, [make_event("4")])
    numbers = {"event_ts_us": make_event("4").ts_us, "revision": 2, "release_order": 6}
    for task in TASKS:
        client.hset(result_key("4", task), mapping={**numbers, "body": "knows more"})
    make().run()
    assert results_of(client, "4") == ["knows more"] * 2


@pytest.mark.parametrize("to", [4, 6])
def test_nothing_is_stored_once_another_publication_serves(
    client: redis.Redis, make: Make, recall_config: RecallConfig, releases: tuple[Release, Release], to: int
) -> None:
    def switch() -> None:
        serve_release(client, releases[1], order=to)

    backfill = make(load=interrupt(releases[0], switch))
    stored: list[object] = []
    follow = backfill._follow_release

    def note(*_: object) -> ServingRelease | None:
        if read_shard(client, to, 0, 1) is None:
            stored.extend(result for user in USERS for result in client.hmget(result_key(user, TASKS[0]), "body"))
        return follow()

    backfill._follow_release = note  # type: ignore[method-assign]
    backfill.run()
    assert set(stored) == {None}, "not a batch of the release that serves no more"
    assert {result.release for result in results(client, recall_config).values()} == {releases[1].name}
    progress = read_shard(client, to, 0, 1)
    assert progress and (progress.stored, progress.finished) == (12, True)


def results_of(client: redis.Redis, user: str) -> list[str]:
    return [str(client.hget(result_key(user, task), "body")) for task in TASKS]


def test_a_killed_shard_goes_on_where_it_was(
    client: redis.Redis, make: Make, recall_config: RecallConfig, releases: tuple[Release, Release]
) -> None:
    class Killed(BaseException):
        pass

    batches = iter(range(2))

    def die_at_third_batch() -> None:
        if next(batches, None) is None:
            raise Killed

    class Dying(Interrupted):
        before = staticmethod(die_at_third_batch)

    def load(publication: Publication) -> ServingRelease:
        return Dying(**vars(load_release(publication, releases[0].settings, releases[0].config.release)))

    with pytest.raises(Killed):
        make(load=load).run()
    (progress,) = read_progress(client, 5)
    assert (progress.done, progress.finished) == (8, False)
    for user in results(client, recall_config):
        client.delete(*(result_key(user, task) for task in TASKS))  # to see that nobody computes them again
    make().run()
    assert set(results(client, recall_config)) == set(USERS[8:])
    (progress,) = read_progress(client, 5)
    assert (progress.done, progress.stored, progress.finished) == (12, 12, True)


def test_a_batch_whose_progress_could_not_be_saved_is_counted_once(
    client: redis.Redis, make: Make, recall_config: RecallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, failures = make(), iter(range(3))
    save = filler._save

    def fail_at_first(release: ServingRelease) -> None:
        if next(failures, None) is not None:
            raise redis.exceptions.OutOfMemoryError
        save(release)

    monkeypatch.setattr(filler, "_save", fail_at_first)
    filler.run()
    assert set(results(client, recall_config)) == set(USERS)
    (progress,) = read_progress(client, 5)
    assert (progress.done, progress.finished) == (len(USERS), True)


def test_a_finished_shard_starts_over_and_renews_what_is_there(
    client: redis.Redis, make: Make, recall_config: RecallConfig
) -> None:
    make().run()
    before = {user: results_of(client, user) for user in USERS}
    client.expire(result_key("5", TASKS[0]), 60)
    client.delete(result_key("6", TASKS[0]))
    make().run()
    after = {user: results_of(client, user) for user in USERS}
    assert [user for user in USERS if before[user] != after[user]] == ["6"]
    assert client.ttl(result_key("5", TASKS[0])) > 60
    (progress,) = read_progress(client, 5)
    assert (progress.done, progress.stored, progress.current) == (12, 1, 11)


def test_shards_share_the_users_without_a_gap(client: redis.Redis, make: Make, recall_config: RecallConfig) -> None:
    for shard in range(3):
        make(shard, 3).run()
    totals = [one.total for one in read_progress(client, 5)]
    assert (sum(totals), len(totals), set(results(client, recall_config))) == (12, 3, set(USERS))
    assert sum(one.current for one in read_progress(client, 5)) == 0, "no user was of two shards"
    many = [choose_shard(f"user-{number}", 8) for number in range(8000)]
    assert min(many.count(shard) for shard in range(8)) > 850


def test_another_release_that_serves_meanwhile_is_gone_on_with(
    client: redis.Redis, make: Make, recall_config: RecallConfig, releases: tuple[Release, Release]
) -> None:
    def promote() -> None:
        send_heartbeat(client, "slow", releases[0].name)
        serve_release(client, releases[1], order=6)

    backfill = make(load=interrupt(releases[0], promote))
    client_of_backfill = backfill._client
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        if seconds > 0:
            waits.append(seconds)
        if len(waits) == 3:
            send_heartbeat(client_of_backfill, "slow", releases[1].name)  # the last worker follows

    backfill._sleep = sleep  # type: ignore[method-assign]
    backfill.run()
    assert backfill.finished and len(waits) >= 3
    assert {result.release for result in results(client, recall_config).values()} == {releases[1].name}
    before, after = read_shard(client, 5, 0, 1), read_shard(client, 6, 0, 1)
    assert before and after and (before.finished, after.finished) == (False, True)


def test_it_waits_for_live_events_and_for_its_rate(
    client: redis.Redis, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time=time.time, monotonic=lambda: 0.0)  # work takes no time
    monkeypatch.setattr("components.recall.worker.backfill.time", clock)
    old = f"{int((time.time() - 5) * 1000)}-0"
    client.xadd(STREAM, {"event": "x"}, id=old)
    backfill = make(rate=3)
    waits: list[tuple[float, int]] = []

    def sleep(seconds: float) -> None:
        progress = read_shard(client, 5, 0, 1)
        waits.append((seconds, progress.done if progress else 0))
        if progress and progress.waiting:
            client.xdel(STREAM, old)

    backfill._sleep = sleep  # type: ignore[method-assign]
    backfill.run()
    assert any(done == 0 and seconds == 0.5 for seconds, done in waits)
    paces = [seconds for seconds, done in waits if done]
    assert paces == [1.0] * 4, "three users per second"


def test_an_erased_user_is_not_brought_back_before_the_next_event(
    client: redis.Redis, make: Make, recall_config: RecallConfig, releases: tuple[Release, Release]
) -> None:
    forget_user(client, "1")
    make(load=interrupt(releases[0], lambda: forget_user(client, "2"))).run()
    assert set(USERS) - set(results(client, recall_config)) == {"1", "2"}
    (progress,) = read_progress(client, 5)
    assert progress.forgotten == 2
    add_history(client, recall_config, [make_event("1")])
    make().run()
    assert set(USERS) - set(results(client, recall_config)) == {"2"}


def test_a_user_who_breaks_the_model_is_left_out(
    client: redis.Redis, make: Make, load_poisoned: Loader, recall_config: RecallConfig
) -> None:
    add_history(client, recall_config, [make_event("9", POISON_ITEM)])
    client.set(result_key("8", TASKS[0]), "no hash")
    make(load=load_poisoned).run()
    client.delete(result_key("8", TASKS[0]))
    assert set(USERS) - set(results(client, recall_config)) == {"8", "9"}
    (progress,) = read_progress(client, 5)
    assert (progress.failed, progress.stored, progress.finished) == (2, 10, True)


def test_a_process_at_which_everything_fails_ends(make: Make, releases: tuple[Release, Release]) -> None:
    def load(publication: Publication) -> ServingRelease:
        class Broken(ServingRelease):
            def recommend(self, requests: Sequence[RecallRequest], k: int) -> list[Ranking]:
                raise RuntimeError("no memory")

        return Broken(**vars(load_release(publication, releases[0].settings, releases[0].config.release)))

    with pytest.raises(SickWorkerError):
        make(load=load).run()


def test_without_a_serving_release_it_says_so(client: redis.Redis, make: Make) -> None:
    client.delete(SERVING)
    with pytest.raises(ReleaseError, match="back-fill: expected a serving release, got none; promote one first"):
        make().run()


def test_the_command_ends_by_sigterm_and_goes_on(
    client: redis.Redis, make: Make, releases: tuple[Release, Release], recall_config: RecallConfig, tmp_path: Path
) -> None:
    """A process of its own, at the lowest priority; its progress can be shown meanwhile."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    settings = releases[0].settings
    environment = {
        **os.environ,
        "URM_REDIS_URL": settings.redis_url,
        "URM_HOME": str(tmp_path),
        "URM_CONFIGS_DIR": str(tmp_path),
    }

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "components", "recall", "backfill", "--config", "tiny", *options]
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = start("--rate", "2")
    wait_until(lambda: any(one.done >= 4 for one in read_progress(client, 5)), 120)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "back-fill stopped" in said
    shown, _ = start("--show").communicate(timeout=60)
    assert "0/1" in shown and "begun" in shown
    _, said = (process := start()).communicate(timeout=120)
    assert process.returncode == 0, said
    assert "back-fill goes on" in said and '"done": 12' in said
    assert set(results(client, recall_config)) == set(USERS)
    assert not any(f'"{user}"' in said for user in USERS), "no line names a user"


def test_the_list_of_users_is_streamed(tmp_path: Path) -> None:
    """Each user once, also where his rows span two row groups; a small part of the file is in memory at a time."""
    schema = pa.schema([("user_id", pa.string()), ("num_events", pa.int64())])
    with pq.ParquetWriter(tmp_path / "user_statistics.parquet", schema) as writer:
        for first in range(0, 300_000, 50_000):
            users = [f"a-rather-long-name-of-user-{(first + row) // 3}" for row in range(50_000)]
            writer.write_table(pa.table({"user_id": users, "num_events": [1] * len(users)}, schema))
    allocated = pa.total_allocated_bytes()
    most = 0

    def watched() -> Iterator[str]:
        nonlocal most
        for user in read_users(tmp_path):
            most = max(most, pa.total_allocated_bytes() - allocated)
            yield user

    assert sum(1 for _ in watched()) == len({*watched()}) == 100_000
    assert most < 8 << 20
