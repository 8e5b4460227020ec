import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import redis
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
from redis.exceptions import LockError

from components.config import ReleaseConfig
from components.deploy.promotion import Candidate, deploy, rollback, synchronize
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import MissingInputError, ReleaseError, UnavailableError
from components.recall.worker.stream import RecallWorker
from components.redis_client import open_redis
from components.release.bundle import hash_manifest, read_manifest, write_manifest
from components.release.publication import (
    LOCK,
    SERVING,
    WANTED,
    WORKER_PREFIX,
    WORKERS,
    Answer,
    Publication,
    answer,
    hold_promotion_lock,
    live_workers,
    name_worker,
    publish,
    read_answers,
    read_publication,
    send_heartbeat,
    serve,
    unregister,
)
from components.release.registry import CANDIDATE, CHAMPION, PREVIOUS, crown, open_registry, version_of_alias
from components.stages.promote import run
from components.storage import StageResult, run_stage
from tests.worlds import make_settings, run_python
from tests.worlds.recall import Release, StartWorker, free_address, wait_until
from tests.worlds.servers import RedisServer, own_server

__all__ = ["own_server"]  # fixtures

Releases = tuple[Release, Release]


def promote(release: Release) -> StageResult:
    return run_stage("promote", run, config=release.config, run_dir=str(release.run_dir), settings=release.settings)


def alias(release: Release, name: str) -> str | None:
    found = version_of_alias(open_registry(release.settings), "urm", name)
    return None if found is None else str(found.tags["urm.release"])


def release_of(client: redis.Redis, key: str) -> str | None:
    """The release that is wanted or serves."""
    publication = read_publication(client, key)
    return None if publication is None else publication.release


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Run a function beside what is done within."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_worker_that_is_late_does_not_turn_the_serving_release_back(client: redis.Redis) -> None:
    old, new = publish(client, "old", "file:///old"), publish(client, "new", "file:///new")
    served = Answer(outcome="serving", seconds=1)
    assert answer(client, new, "quick", served)
    assert not answer(client, old, "slow", served)
    assert read_answers(client, old) == {}
    assert read_publication(client, SERVING) == new
    again = publish(client, "old", "file:///old")  # a rollback is a later publication
    answer(client, again, "quick", served)
    assert read_publication(client, SERVING) == again


def test_orders_grow_also_when_redis_has_forgotten_them(client: redis.Redis) -> None:
    first, second = publish(client, "a", "/a"), publish(client, "b", "/b")

    def has_passed() -> bool:  # orders are milliseconds of Redis' clock, one more within the same one
        seconds, microseconds = client.time()
        return seconds * 1000 + microseconds // 1000 > second.order

    wait_until(has_passed)  # two publications may share one; a Redis that restarts takes longer than that
    client.flushall()
    assert first.order < second.order < publish(client, "c", "/c").order
    client.flushall()
    serve(client, Publication(release="b", bundle="/b", order=second.order + 10**9))  # its clock was ahead
    assert publish(client, "d", "/d").order == second.order + 10**9 + 1


def test_live_workers_are_those_that_beat_lately(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    send_heartbeat(client, "stays", "urm-a")
    send_heartbeat(client, "leaves", "")
    monkeypatch.setattr("components.release.publication.HEARTBEAT_TTL_SECONDS", 2)
    send_heartbeat(client, "dies", "")
    assert live_workers(client) == {"stays", "leaves", "dies"}
    unregister(client, "leaves")
    wait_until(lambda: live_workers(client) == {"stays"})
    assert client.mget([WORKER_PREFIX + name for name in ("stays", "leaves")]) == ["urm-a", None]
    assert client.zcard(WORKERS) == 2
    send_heartbeat(client, "comes", "")
    assert set(client.zrange(WORKERS, 0, -1)) == {"stays", "comes"}  # who is gone is forgotten


def test_finding_the_live_workers_does_not_walk_through_all_keys(client: redis.Redis) -> None:
    client.config_resetstat()
    send_heartbeat(client, "worker", "")
    assert live_workers(client) == {"worker"}
    assert not {"cmdstat_scan", "cmdstat_keys"} & client.info("commandstats").keys()


def test_promote_twice_and_roll_back(client: redis.Redis, releases: Releases, start_worker: StartWorker) -> None:
    first, second = releases
    start_worker()
    result = promote(first)
    deployment = json.loads(Path(result.outputs["deployment"]).read_text())
    assert deployment["release"] == first.name
    assert deployment["outcome"] == "serving"
    assert alias(first, CHAMPION) == first.name
    promote(second)
    assert (alias(first, CHAMPION), alias(first, PREVIOUS), alias(first, CANDIDATE)) == (second.name, first.name, None)
    promote(second)  # again: changes nothing
    assert (alias(first, CHAMPION), alias(first, PREVIOUS)) == (second.name, first.name)
    assert rollback(first.settings, first.config.release)["release"] == first.name
    assert (alias(first, CHAMPION), alias(first, PREVIOUS)) == (first.name, second.name)
    serving = read_publication(client, SERVING)
    assert serving is not None and serving.release == first.name
    assert serving.manifest == hash_manifest(first.bundle)


def test_a_bundle_that_was_exchanged_after_its_release_is_rejected(
    client: redis.Redis, releases: Releases, promoted: tuple[RecallWorker, Publication], broken_bundle: Path
) -> None:
    """Even with a manifest that fits: it is not the one that was registered."""
    manifest, digest = read_manifest(broken_bundle), str(releases[1].result.metrics["manifest"])
    write_manifest(broken_bundle, manifest.model_copy(update={"links": {"run": "elsewhere"}}))
    with pytest.raises(ReleaseError, match=r"a rejection by worker-a: .*manifest.json: expected SHA-256 .* published"):
        exchanged = Candidate(releases[1].name, str(broken_bundle), digest)
        deploy(releases[1].settings, releases[1].config.release, "urm", exchanged)
    wanted = read_publication(client, WANTED)
    assert wanted is not None and wanted.manifest == promoted[1].manifest and wanted.release == releases[0].name


def test_rejected_release_leaves_aliases_and_wish_as_they_were(
    client: redis.Redis, releases: Releases, promoted: tuple[RecallWorker, Publication]
) -> None:
    champion = alias(releases[0], CHAMPION)
    name = releases[1].name
    with pytest.raises(ReleaseError, match=f"release {name}: expected every worker to serve it, got a rejection"):
        wrong = Candidate(name, str(releases[0].bundle))
        deploy(releases[1].settings, releases[1].config.release, "urm", wrong)
    assert alias(releases[0], CHAMPION) == champion
    assert release_of(client, WANTED) == releases[0].name


def test_nobody_there_is_one_sentence(client: redis.Redis, releases: Releases) -> None:
    with pytest.raises(UnavailableError, match="recall workers: expected at least one alive, got no heartbeat"):
        promote(releases[0])
    assert read_publication(client, WANTED) is None
    url = f"redis://:secret@{free_address()}/0"
    settings = releases[0].settings.model_copy(update={"redis_url": url})
    with pytest.raises(UnavailableError, match=r"Redis at redis://127\.0\.0\.1:.*expected an answer") as caught:
        run_stage("promote", run, config=releases[0].config, run_dir=str(releases[0].run_dir), settings=settings)
    assert "secret" not in str(caught.value)


def test_redis_that_is_full_is_one_sentence(client: redis.Redis, releases: Releases) -> None:
    send_heartbeat(client, "w", "")
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(UnavailableError, match=r"Redis at .*: expected room for a write, got none below its maxm"):
            promote(releases[0])
    finally:
        client.config_set("maxmemory", 0)


def test_silent_worker_makes_it_time_out_and_the_wish_is_restored(client: redis.Redis) -> None:
    before = publish(client, "urm-a", "/a")
    send_heartbeat(client, "stuck", "")
    with pytest.raises(ReleaseError, match=r"no answer from stuck within 0\.3 s.*wanted before is wanted again"):
        roll_out(WorkerFlip(client), "urm-b", "/b", timeout_seconds=0.3)
    wanted = read_publication(client, WANTED)
    assert wanted is not None and (wanted.release, wanted.bundle) == (before.release, before.bundle)
    assert wanted.order > before.order


def test_what_serves_is_wanted_again_where_redis_has_forgotten_what_was_wanted(client: redis.Redis) -> None:
    before = publish(client, "urm-a", "/a")
    serve(client, before)
    client.delete(WANTED)
    send_heartbeat(client, "stuck", "")
    with pytest.raises(ReleaseError):
        roll_out(WorkerFlip(client), "urm-b", "/b", timeout_seconds=0.3)
    assert release_of(client, WANTED) == "urm-a"


def test_sigterm_while_waiting_restores_the_wish(client: redis.Redis) -> None:
    publish(client, "urm-a", "/a")
    send_heartbeat(client, "stuck", "")

    def terminate() -> None:
        wait_until(lambda: "urm-b" in str(client.get(WANTED)))
        os.kill(os.getpid(), signal.SIGTERM)

    as_before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with meanwhile(terminate), pytest.raises(SystemExit):
            roll_out(WorkerFlip(client), "urm-b", "/b", timeout_seconds=10)
    finally:
        signal.signal(signal.SIGTERM, as_before)
    assert release_of(client, WANTED) == "urm-a"


def pause_once_wanted(server: RedisServer, client: redis.Redis, seconds: float, then: Callable[[], None]) -> None:
    wait_until(lambda: "urm-b" in str(client.get(WANTED)))
    server.pause()
    time.sleep(seconds)
    server.resume()
    then()


def test_a_redis_that_hangs_while_waiting_is_waited_for(own_server: RedisServer) -> None:
    with redis.Redis.from_url(own_server.url, decode_responses=True) as client:
        send_heartbeat(client, "worker", "")

        def answer_late() -> None:
            publication = read_publication(client, WANTED)
            assert publication is not None
            answer(client, publication, "worker", Answer(outcome="serving", seconds=1))

        with meanwhile(lambda: pause_once_wanted(own_server, client, 1.0, answer_late)):
            publication = roll_out(WorkerFlip(open_redis(own_server.url, 0.2)), "urm-b", "/b", timeout_seconds=30)
        assert read_publication(client, WANTED) == publication


def test_a_redis_that_hangs_too_long_is_an_error_and_the_wish_is_restored(own_server: RedisServer) -> None:
    with redis.Redis.from_url(own_server.url, decode_responses=True) as client:
        publish(client, "urm-a", "/a")
        send_heartbeat(client, "worker", "")
        with meanwhile(lambda: pause_once_wanted(own_server, client, 2.0, lambda: None)):
            with pytest.raises((redis.ConnectionError, redis.TimeoutError)):
                roll_out(WorkerFlip(open_redis(own_server.url, 0.2)), "urm-b", "/b", timeout_seconds=0.5)
        assert release_of(client, WANTED) == "urm-a"


def test_failed_publication_does_not_undo_a_later_one(client: redis.Redis) -> None:
    send_heartbeat(client, "stuck", "")

    def overtake() -> None:
        wait_until(lambda: read_publication(client, WANTED))
        publish(client, "urm-c", "/c")

    with meanwhile(overtake), pytest.raises(ReleaseError):
        roll_out(WorkerFlip(client), "urm-b", "/b", timeout_seconds=0.5)
    assert release_of(client, WANTED) == "urm-c"


def test_all_live_workers_must_answer(client: redis.Redis) -> None:
    send_heartbeat(client, "quick", "")
    send_heartbeat(client, "slow", "")

    def answer_one() -> None:
        wait_until(lambda: read_publication(client, WANTED))
        publication = read_publication(client, WANTED)
        assert publication is not None
        answer(client, publication, "quick", Answer(outcome="serving", seconds=0.1))

    with meanwhile(answer_one), pytest.raises(ReleaseError, match="no answer from slow"):
        roll_out(WorkerFlip(client), "urm-b", "/b", timeout_seconds=0.5)


def test_a_registry_without_the_release_is_one_sentence(
    client: redis.Redis, releases: Releases, tmp_path: Path
) -> None:
    release = releases[0]
    send_heartbeat(client, "w", "")
    elsewhere = release.settings.model_copy(update={"mlflow_uri": f"sqlite:///{tmp_path}/other.db"})
    with pytest.raises(ReleaseError, match=f"{release.name}: expected a version of 'urm' in the registry .* got none;"):
        deploy(elsewhere, release.config.release, "urm", candidate_of(release))
    assert read_publication(client, WANTED) is None


def test_a_release_is_found_under_whatever_number_the_registry_has_it(
    client: redis.Redis, releases: Releases, tmp_path: Path
) -> None:
    """As in a registry that was restored, or to which it was registered again."""
    release = releases[0]
    settings = make_settings(tmp_path, release.settings.redis_url)
    registry = open_registry(settings)
    registry.create_registered_model("urm")
    for name in ("urm-other", release.name):
        number = registry.create_model_version("urm", str(tmp_path), tags={"urm.release": name}).version
    registry.set_registered_model_alias("urm", CANDIDATE, number)
    assert str(number) != str(release.result.metrics["version"])
    with answering(client, release.name, quick="serving"):
        moved = run_stage(
            "promote", run, config=release.config, run_dir=str(release.run_dir), settings=settings, force=True
        )
    assert moved.metrics["version"] == str(number)
    champion = version_of_alias(registry, "urm", CHAMPION)
    assert champion is not None and champion.version == number


def test_what_is_refused_moves_no_alias(client: redis.Redis, releases: Releases) -> None:
    """Also where what serves is not the champion, which the next promotion would put right."""
    settings, config = releases[0].settings, releases[0].config.release
    with answering(client, releases[0].name, quick="serving"):
        deploy(settings, config, "urm", candidate_of(releases[0]))
    registry = open_registry(settings)
    registry.set_registered_model_alias("urm", CHAMPION, str(releases[1].result.metrics["version"]))
    unknown = Candidate("urm-unknown", str(releases[1].bundle))
    with pytest.raises(ReleaseError, match="release urm-unknown: expected a version of 'urm' in the registry"):
        deploy(settings, config, "urm", unknown)
    for name in ("urm-unknown", "urm'; drop"):
        with pytest.raises(ReleaseError, match=f"release {name!r}: expected one of the registry, got none"):
            rollback(settings, config, to=name)
    assert alias(releases[0], CHAMPION) == releases[1].name
    assert synchronize(settings, config) == releases[0].name


def test_bundle_that_is_gone_is_named(client: redis.Redis, releases: Releases) -> None:
    with pytest.raises(MissingInputError, match="release urm-x: expected its bundle at /nowhere, got nothing"):
        deploy(releases[0].settings, releases[0].config.release, "urm", Candidate("urm-x", "/nowhere"))


def candidate_of(release: Release) -> Candidate:
    return Candidate(release.name, str(release.bundle))


def test_parallel_promotions_and_rollbacks_leave_one_release_wanted_serving_and_champion(
    api: TestClient, client: redis.Redis, releases: Releases, start_worker: StartWorker
) -> None:
    settings, config = releases[0].settings, releases[0].config.release
    start_worker("a")
    start_worker("b")
    for release in releases:
        deploy(settings, config, "urm", candidate_of(release))
    chance = random.Random(7)
    acts: list[Callable[[], object]] = [
        lambda: deploy(settings, config, "urm", candidate_of(releases[0])),
        lambda: deploy(settings, config, "urm", candidate_of(releases[1])),
        lambda: rollback(settings, config),
    ]
    with ThreadPoolExecutor(20) as pool:
        for done in [pool.submit(chance.choice(acts)) for _ in range(20)]:
            done.result()
    wanted, serving = read_publication(client, WANTED), read_publication(client, SERVING)
    assert wanted is not None and wanted == serving
    assert alias(releases[0], CHAMPION) == wanted.release
    wait_until(lambda: api.get("/v1/tasks").json()["release"] == wanted.release)


def test_what_a_killed_promotion_left_is_put_right_by_the_next_one(
    client: redis.Redis, releases: Releases, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the workers had flipped and the aliases had not changed; the roll-back goes to what served before."""
    settings, config = releases[0].settings, releases[0].config.release
    start_worker()
    for release in releases:
        deploy(settings, config, "urm", candidate_of(release))

    class Killed(BaseException):
        """As by SIGKILL, but that the lock is released and not left to expire."""

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("components.deploy.promotion.crown", kill)
        with pytest.raises(Killed):
            deploy(settings, config, "urm", candidate_of(releases[0]))
    assert release_of(client, SERVING) == releases[0].name
    assert alias(releases[0], CHAMPION) == releases[1].name
    assert rollback(settings, config)["release"] == releases[1].name
    assert (alias(releases[0], CHAMPION), alias(releases[0], PREVIOUS)) == (releases[1].name, releases[0].name)


@pytest.mark.parametrize("act", ["promotion", "rollback", "sync"])
def test_a_registry_that_goes_away_meanwhile_is_one_sentence_and_what_serves_is_made_champion_later(
    act: str, client: redis.Redis, releases: Releases, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, config = releases[0].settings, releases[0].config.release
    start_worker()
    for release in releases:
        deploy(settings, config, "urm", candidate_of(release))
    registry = open_registry(settings)
    if act == "sync":
        registry.set_registered_model_alias("urm", CHAMPION, str(releases[0].result.metrics["version"]))
    acts = {
        "promotion": lambda: deploy(settings, config, "urm", candidate_of(releases[0])),
        "rollback": lambda: rollback(settings, config),
        "sync": lambda: synchronize(settings, config),
    }

    def fail(*_: object) -> None:
        raise MlflowException("API request to /alias failed\nstatus 503")

    with monkeypatch.context() as away:
        away.setattr(SqlAlchemyStore, "set_registered_model_alias", fail)
        with pytest.raises(UnavailableError, match=r"expected an answer, got API request to /alias failed;"):
            acts[act]()
    serving = releases[1 if act == "sync" else 0].name
    assert release_of(client, SERVING) == serving
    assert synchronize(settings, config) == serving
    assert alias(releases[0], CHAMPION) == serving


@contextmanager
def answering(client: redis.Redis, release: str, **outcomes: Literal["serving", "rejected"]) -> Iterator[None]:
    """Workers that answer the next publication of a release, and load nothing else."""

    def act() -> None:
        wait_until(lambda: release_of(client, WANTED) == release)
        publication = read_publication(client, WANTED)
        assert publication is not None
        for worker, outcome in outcomes.items():
            answer(client, publication, worker, Answer(outcome=outcome, seconds=0))

    for worker in outcomes:
        send_heartbeat(client, worker, "")
    with meanwhile(act):
        yield


def fail_second(client: redis.Redis, releases: Releases) -> ReleaseConfig:
    """The first release serves; the second one fails once a worker has flipped to it, which reloads the first now.

    Returns:
        A config that waits a moment only.
    """
    settings, config = releases[0].settings, releases[0].config.release
    with answering(client, releases[0].name, quick="serving"):
        deploy(settings, config, "urm", candidate_of(releases[0]))
    send_heartbeat(client, "stuck", "")
    hasty = config.model_copy(update={"promote_timeout_seconds": 1})
    with answering(client, releases[1].name, quick="serving"), pytest.raises(ReleaseError, match="answer from stuck"):
        deploy(settings, hasty, "urm", candidate_of(releases[1]))
    assert (release_of(client, WANTED), release_of(client, SERVING)) == (releases[0].name, releases[1].name)
    return hasty


def test_a_promotion_that_failed_does_not_win_by_failing_again(client: redis.Redis, releases: Releases) -> None:
    hasty = fail_second(client, releases)
    with pytest.raises(ReleaseError, match="no answer from quick, stuck"):
        deploy(releases[1].settings, hasty, "urm", candidate_of(releases[1]))
    assert release_of(client, WANTED) == releases[0].name
    assert alias(releases[0], CHAMPION) == releases[0].name


def test_what_workers_are_about_to_leave_is_not_made_champion(client: redis.Redis, releases: Releases) -> None:
    hasty = fail_second(client, releases)
    assert synchronize(releases[0].settings, hasty) == releases[0].name
    assert alias(releases[0], CHAMPION) == releases[0].name


def test_what_a_worker_rejected_is_not_wanted_again_after_the_next_failure(client: redis.Redis) -> None:
    serve(client, publish(client, "urm-a", "/a"))
    with answering(client, "urm-b", quick="serving", other="rejected"), pytest.raises(ReleaseError, match="by other"):
        roll_out(WorkerFlip(client), "urm-b", "/b", timeout_seconds=10)
    assert (release_of(client, WANTED), release_of(client, SERVING)) == ("urm-a", "urm-b")
    target = WorkerFlip(client)
    settled = target.settle("", 0, 1)  # a registry that knows none of them
    assert settled == read_publication(client, WANTED)
    with pytest.raises(ReleaseError, match="no answer from"):
        roll_out(target, "urm-c", "/c", timeout_seconds=0.2)
    assert release_of(client, WANTED) == "urm-a"


def test_another_version_of_the_release_that_serves_stays_champion(
    client: redis.Redis, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Else the first version would replace it, and `previous` be the release that serves."""
    settings = make_settings(tmp_path, redis_server.url)
    registry = open_registry(settings)
    registry.create_registered_model("urm")
    for _ in range(2):
        again = registry.create_model_version("urm", str(tmp_path), tags={"urm.release": "urm-a"}).version
    registry.set_registered_model_alias("urm", CHAMPION, again)
    registry.update_model_version("urm", "1", "touched last")  # the registry gives it first
    serve(client, publish(client, "urm-a", "/a"))
    assert synchronize(settings, ReleaseConfig()) == "urm-a"
    champion = version_of_alias(registry, "urm", CHAMPION)
    assert champion is not None and champion.version == again
    assert version_of_alias(registry, "urm", PREVIOUS) is None


def test_one_promotion_at_a_time(client: redis.Redis) -> None:
    send_heartbeat(client, "worker", "")
    with hold_promotion_lock(client, 1) as lock:
        with pytest.raises(UnavailableError, match=r"promotion: expected the one in progress to end within 0\.2 s"):
            with hold_promotion_lock(client, 0.2):
                pass
        with pytest.raises(ReleaseError, match="release b: expected the only promotion, got another in progress"):
            publish(client, "b", "/b")
        first = publish(client, "a", "/a", lock)
        client.delete(LOCK)  # as if it had expired while this promotion stood still
        with pytest.raises(LockError):
            WorkerFlip(client, lock).wait(first, 10)
        with pytest.raises(ReleaseError, match="another in progress"):
            publish(client, "a", "/a", lock)
    assert publish(client, "c", "/c").order > first.order


def test_aliases_and_numbers_outlive_the_redis_that_gave_them(
    client: redis.Redis, releases: Releases, start_worker: StartWorker
) -> None:
    settings, config = releases[0].settings, releases[0].config.release
    registry = open_registry(settings)
    start_worker()
    order = deploy(settings, config, "urm", candidate_of(releases[0]))["order"]
    registry.set_registered_model_tag("urm", "urm.order", str(order + 10**9))  # the clock of the lost Redis was ahead
    with pytest.raises(ReleaseError, match="expected the latest promotion, got a later one"):
        crown(registry, "urm", str(releases[1].result.metrics["version"]), order + 1)
    assert alias(releases[0], CHAMPION) == releases[0].name
    assert deploy(settings, config, "urm", candidate_of(releases[1]))["order"] > order + 10**9
    registry.set_registered_model_tag("urm", "urm.order", "0")  # for the other tests of this registry


def test_a_process_has_a_name_that_no_other_ever_had() -> None:
    """Process 1 of a restarted container must not inherit the answers of the one before."""
    program = "from components.release.publication import name_worker; print(name_worker())"
    names = [run_python("-c", program, check=True).stdout.strip() for _ in range(2)]
    with subprocess.Popen(["sleep", "60"]) as process:
        name = name_worker(process.pid)
        host, pid, started = name.rsplit("-", 2)
        assert (host, pid) == (socket.gethostname(), str(process.pid)) and int(started) > 0
        process.kill()
    assert len({*names, name}) == 3 and names[0].rsplit("-", 1)[1] != names[1].rsplit("-", 1)[1]
