"""Promotion to a cluster, on a stand-in for the API server, with a real Redis and a real registry."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import redis

from components.deploy.cluster import Cluster, Object
from components.deploy.kubernetes import AD_HOC, CAUSE, DEPLOYMENTS, WORKER, DeploymentRollout, read_template
from components.deploy.lease import Lease
from components.deploy.promotion import Candidate, deploy, rollback, synchronize
from components.deploy.releases import list_promotions
from components.exceptions import GateError, ReleaseError, UnavailableError
from components.release.bundle import MANIFEST, hash_manifest, read_manifest, write_manifest
from components.release.publication import Publication
from components.release.registry import CANDIDATE, CHAMPION, PREVIOUS, open_registry, version_of_alias
from tests.worlds import wait_until
from tests.worlds.cluster import ApiServer, unready
from tests.worlds.recall import Release

Connect = Callable[[], Cluster]


class Killed(BaseException):
    """As by SIGKILL."""


class MortalCluster(Cluster):
    """A connection whose process is killed after some writes of the promotion: none of its later ones is made.

    The Lease is renewed by another thread, as often as the machine's speed has it: those writes do not count.
    """

    def __init__(self, cluster: Cluster, writes: int) -> None:
        super().__init__(cluster._api, cluster.namespace)
        self.left = writes

    def _call(self, method: str, *arguments: Any, **options: Any) -> Object:
        if threading.current_thread() is not threading.main_thread():
            return super()._call(method, *arguments, **options)
        if self.left <= 0:
            raise Killed
        answer = super()._call(method, *arguments, **options)
        self.left -= method != "GET"
        if self.left == 0:
            raise Killed
        return answer


class World:
    """A cluster, a registry with two releases, and promotions between them."""

    def __init__(
        self, state: ApiServer, connect: Connect, client: redis.Redis, releases: tuple[Release, Release], patch: Any
    ) -> None:
        self.state, self.connect, self.client, self.releases, self._patch = state, connect, client, releases, patch
        self.settings = releases[0].settings.model_copy(update={"deploy_to": "kubernetes"})
        self.config = releases[0].config.release.model_copy(update={"promote_timeout_seconds": 3})
        self.registry = open_registry(self.settings)
        self.checked: list[str] = []
        self.failing: dict[str, Exception] = {}
        for alias in (CANDIDATE, CHAMPION, PREVIOUS):
            self.registry.delete_registered_model_alias("urm", alias)
        self.registry.set_registered_model_tag("urm", "urm.order", "0")

    def target(self, cluster: Cluster | None = None) -> DeploymentRollout:
        cluster = cluster or self.connect()
        return DeploymentRollout(cluster, self.client, self._check, Lease(cluster, 1.0))

    def _check(self, publication: Publication, ad_hoc: bool) -> Mapping[str, float]:
        self.checked.append(publication.release)
        if publication.release in self.failing:
            raise self.failing[publication.release]
        return {"overlap": 1.0}

    def use(self, cluster: Cluster | None = None) -> None:
        """Let the next promotions use one connection."""
        self._patch.setattr("components.deploy.promotion.open_target", lambda *_: self.target(cluster))

    def candidate(self, number: int) -> Candidate:
        release = self.releases[number]
        return Candidate(release.name, str(release.bundle), str(release.result.metrics["manifest"]))

    def offer(self, number: int) -> None:
        """Make a release the candidate."""
        version = str(self.releases[number].result.metrics["version"])
        self.registry.set_registered_model_alias("urm", CANDIDATE, version)

    def promote(self, number: int, cluster: Cluster | None = None) -> dict[str, Any]:
        self.use(cluster)
        self.offer(number)
        return deploy(self.settings, self.config, "urm", self.candidate(number))

    def go_back_by_hand(self) -> dict[str, Any]:
        """Promote both releases and go back to the first by `kubectl rollout undo`; its Deployments as they were."""
        self.promote(0)
        old = {name: self.state.read(name) for name in DEPLOYMENTS}
        self.promote(1)
        for name in DEPLOYMENTS:
            self.state.roll_back_by_hand(name, old[name])
        return old

    def alias(self, name: str) -> str | None:
        found = version_of_alias(self.registry, "urm", name)
        return None if found is None else str(found.tags["urm.release"])

    @property
    def now(self) -> tuple[str | None, ...]:
        """What both templates name, and the champion."""
        found = [read_template(self.state.read(name)) for name in DEPLOYMENTS]
        return *(one.release if one else None for one in found), self.alias(CHAMPION)


@pytest.fixture
def world(
    api_server: tuple[ApiServer, Connect],
    client: redis.Redis,
    releases: tuple[Release, Release],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    monkeypatch.setattr("components.deploy.kubernetes._POLL_SECONDS", 0.05)
    monkeypatch.setattr("components.deploy.lease._POLL_SECONDS", 0.05)
    yield World(*api_server, client, releases, monkeypatch)


@pytest.fixture
def names(releases: tuple[Release, Release]) -> tuple[str, str]:
    return releases[0].name, releases[1].name


def test_a_promotion_names_the_release_in_both_templates_and_says_who_why_and_what_was_before(
    world: World, names: tuple[str, str], releases: tuple[Release, Release]
) -> None:
    first = world.promote(0)
    assert world.now == (names[0],) * 3
    assert world.state.notes(WORKER)["urm.release/previous"] == ""
    second = world.promote(1)
    assert world.now == (names[1],) * 3
    assert (world.alias(PREVIOUS), world.alias(CANDIDATE), second["overlap"]) == (names[0], None, 1.0)
    expected = {"name": names[1], "bundle": str(releases[1].bundle), "manifest": hash_manifest(releases[1].bundle)}
    expected |= {"order": str(second["order"])}
    for name in DEPLOYMENTS:
        assert world.state.template(name) == {f"urm.release/{key}": text for key, text in expected.items()}
        notes = world.state.notes(name)
        assert notes[CAUSE].startswith(f"promotion: {names[1]} (gate passed), by ")
        before = Publication.model_validate_json(notes["urm.release/previous"])
        assert (before.release, before.order) == (names[0], first["order"])
        assert notes["urm.release/run"] and notes["urm.release/figures"] == "Measured."
    assert second["order"] > first["order"]
    (last, *_), unknown = list_promotions(releases[0].settings, world.config)
    assert (last.release, last.order, last.note["why"], last.note["overlap"]) == (
        *(names[1], second["order"]),
        *("promotion", 1.0),
    )
    assert "champion" in last.now and unknown == ""


def test_promoting_again_what_serves_replaces_no_pod(world: World, names: tuple[str, str]) -> None:
    order = world.promote(0)["order"]
    written = list(world.state.written)
    assert world.promote(0)["order"] == order
    assert not [one for one in world.state.written[len(written) :] if one.startswith("deployments")]
    assert world.now == (names[0],) * 3


def test_a_release_that_does_not_start_is_undone_exactly_with_the_reason(world: World, names: tuple[str, str]) -> None:
    world.promote(0)
    before = {name: (world.state.template(name), world.state.notes(name)) for name in DEPLOYMENTS}

    def wrong_hash(name: str) -> Object:
        ended = {
            "exitCode": 2,
            "message": "error bundle /b, file index.faiss: expected SHA-256 1a…, got 2b…; build again.",
        }
        return {"initContainerStatuses": [{"name": "fetch", "image": "i", "lastState": {"terminated": ended}}]}

    world.state.pods[names[1]] = wrong_hash
    began = time.monotonic()
    with pytest.raises(
        ReleaseError, match=r"got pod recall-worker-.*, container fetch: .*got 2b…; build again; fix it"
    ):
        world.promote(1)
    assert time.monotonic() - began < world.config.promote_timeout_seconds  # no restart helps, so nobody waits for it
    assert {name: (world.state.template(name), world.state.notes(name)) for name in DEPLOYMENTS} == before
    assert world.now == (names[0],) * 3 and world.alias(CANDIDATE) == names[1]
    world.state.pods.clear()
    world.promote(1)
    assert world.now == (names[1],) * 3


def test_pods_that_never_get_ready_are_waited_for_until_the_deadline(world: World, names: tuple[str, str]) -> None:
    world.promote(0)
    world.state.pods[names[1]] = unready
    world.state.warnings = {f"{WORKER}-3-0": ["Readiness probe failed: HTTP probe failed with statuscode: 503"]}
    world.config = world.config.model_copy(update={"promote_timeout_seconds": 0.3})
    with pytest.raises(
        ReleaseError, match=r"serve it within 0\.3 s, got pod .* is not ready \(Readiness .* 503\); fix"
    ):
        world.promote(1)
    assert world.now == (names[0],) * 3


def test_a_first_release_that_fails_leaves_no_release(world: World, names: tuple[str, str]) -> None:
    world.state.pods[names[0]] = unready
    world.config = world.config.model_copy(update={"promote_timeout_seconds": 0.2})
    with pytest.raises(ReleaseError):
        world.promote(0)
    assert world.now == (None, None, None)
    assert [world.state.template(name) for name in DEPLOYMENTS] == [{}, {}]


def test_what_fails_the_check_is_undone(world: World, names: tuple[str, str]) -> None:
    world.promote(0)
    world.failing[names[1]] = ReleaseError("smoke check", expected="0.95", got="0.4", remedy="look")
    with pytest.raises(ReleaseError, match=r"expected 0\.95, got 0\.4"):
        world.promote(1)
    assert world.now == (names[0],) * 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the request that it breaks off
def test_sigterm_undoes(world: World, names: tuple[str, str]) -> None:
    world.promote(0)
    world.state.pods[names[1]] = unready

    def terminate() -> None:
        wait_until(lambda: world.state.template(AD_HOC)["urm.release/name"] == names[1])
        os.kill(os.getpid(), signal.SIGTERM)

    as_before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        with pytest.raises(SystemExit):
            world.promote(1)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, as_before)
    assert world.now == (names[0],) * 3


def test_an_api_that_is_away_for_a_moment_is_waited_for(world: World, names: tuple[str, str]) -> None:
    world.promote(0)
    target = world.target()
    with target.hold(2):
        publication = target.publish("urm-x", "/x")
        world.state.refused["GET"] = [503] * 5
        target.wait(publication, 5)
        world.state.refused["GET"] = [503] * 2
        target.undo(publication)
    assert world.now == (names[0],) * 3


# Writes of a promotion: the Lease, both Deployments, both again if it is undone.
@pytest.mark.parametrize(("writes", "good"), [(1, True), (2, True), (3, True), (2, False), (3, False), (4, False)])
def test_a_promotion_that_is_killed_is_finished_or_undone_by_the_next(
    writes: int, good: bool, world: World, names: tuple[str, str]
) -> None:
    world.promote(0)
    config = world.config
    if not good:
        world.state.pods[names[1]] = unready
        world.config = config.model_copy(update={"promote_timeout_seconds": 0.1})  # and undone then
    with pytest.raises(Killed):
        world.promote(1, MortalCluster(world.connect(), writes))
    assert world.alias(CHAMPION) == names[0] and len(set(world.now[:2])) == (1 if writes in (1, 3) else 2)
    world.config = config
    world.use()
    finished = good and writes == 3
    assert synchronize(world.settings, world.config) == (names[1] if finished else names[0])
    assert world.now == (names[1] if finished else names[0],) * 3
    assert world.alias(PREVIOUS) == (names[0] if finished else None)
    world.state.pods.clear()
    world.promote(1)
    assert (world.now, world.alias(PREVIOUS)) == ((names[1],) * 3, names[0])


@pytest.mark.parametrize("name", DEPLOYMENTS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_deployment_that_was_made_anew_gets_the_release_of_the_other(
    number: int, name: str, world: World, names: tuple[str, str]
) -> None:
    new = world.state.read(name)
    for promoted in range(number + 1):
        world.promote(promoted)
    before = world.state.notes(name)
    world.state.roll_back_by_hand(name, new)  # deleted and applied again
    world.use()
    assert synchronize(world.settings, world.config) == names[number]
    assert world.now == (names[number],) * 3
    assert world.state.notes(name) == before
    world.promote(1 - number)
    assert world.now == (names[1 - number],) * 3


def test_a_first_promotion_killed_between_the_deployments_leaves_no_release(
    world: World, names: tuple[str, str]
) -> None:
    with pytest.raises(Killed):
        world.promote(0, MortalCluster(world.connect(), 2))
    assert world.now == (names[0], None, None)
    world.use()
    assert synchronize(world.settings, world.config) is None
    assert world.now == (None,) * 3


def test_a_promotion_killed_between_serving_and_aliases_is_finished_by_the_next(
    world: World, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.promote(0)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("components.deploy.promotion.crown", kill)
        with pytest.raises(Killed):
            world.promote(1)
    assert world.now == (names[1], names[1], names[0])
    world.use()
    back = rollback(
        world.settings, world.config, why="it misbehaves"
    )  # to what served before, which it finds out first
    assert back["release"] == names[0]
    assert (world.now, world.alias(PREVIOUS)) == ((names[0],) * 3, names[1])
    assert world.state.notes(WORKER)[CAUSE].startswith(f"it misbehaves: {names[0]} (gate passed), by ")


def test_a_promotion_that_stood_still_may_not_go_on(world: World, names: tuple[str, str]) -> None:
    world.promote(0)
    stale, other = world.target(), world.target()
    stale._lease._acquire(2)  # and nothing renews it, as in a process that is stopped
    stalled = stale.publish("urm-stale", "/stale")
    with other.hold(5):
        publication = other.publish("urm-other", "/other")
        with pytest.raises(ReleaseError, match="Lease urm-promotion: expected the only promotion, got another one"):
            stale.wait(stalled, 2)
        stale.undo(stalled)
        with pytest.raises(ReleaseError, match="the only promotion"):
            stale.publish("urm-again", "/again")
        other.wait(publication, 2)
    assert world.now == ("urm-other", "urm-other", names[0])


def test_a_late_write_is_refused_by_the_version_that_it_was_decided_on(world: World) -> None:
    """Stopped between its look at the Lease and its write: the other has written meanwhile."""
    stale, other = world.target(), world.target()
    stale._lease._acquire(2)
    taken = []

    class Slow(Cluster):
        def apply_deployment(self, *arguments: Any) -> Object:
            if not taken:
                with other.hold(5):
                    taken.append(other.publish("urm-other", "/other"))
            return super().apply_deployment(*arguments)

    stale._cluster = Slow(stale._cluster._api, stale._cluster.namespace)
    with pytest.raises(ReleaseError, match="Deployment recall-worker: expected the only promotion"):
        stale.publish("urm-stale", "/stale")
    assert world.now == ("urm-other", "urm-other", None)


def test_two_at_once_leave_one_release_in_both_templates_and_as_champion(world: World, names: tuple[str, str]) -> None:
    world.promote(0)
    world.use()
    for number in (0, 1):
        world.offer(number)
    ended: list[str] = []

    def act(number: int) -> None:
        way_back = [world.settings, world.config]
        ended.append(rollback(*way_back, to=names[number], why="a test")["release"])

    world.config = world.config.model_copy(update={"promote_timeout_seconds": 30})
    threads = [threading.Thread(target=act, args=[number]) for number in (1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 3 and len(set(world.now)) == 1
    assert world.now[0] == ended[-1]


def test_after_an_undo_by_hand_the_aliases_follow_what_serves(world: World, names: tuple[str, str]) -> None:
    old = world.go_back_by_hand()
    assert world.now == (names[0], names[0], names[1])
    assert synchronize(world.settings, world.config) == names[0]
    assert (world.now, world.alias(PREVIOUS)) == ((names[0],) * 3, names[1])
    world.promote(0)  # nothing to do, though its order is an earlier one than the registry's
    world.promote(1)
    world.state.roll_back_by_hand(WORKER, old[WORKER])  # of one alone: the other follows
    assert synchronize(world.settings, world.config) == names[0]
    assert (world.now, world.alias(PREVIOUS)) == ((names[0],) * 3, names[1])
    assert "urm.release" not in world.state.notes(AD_HOC)[CAUSE] and names[1] in world.state.notes(AD_HOC)[CAUSE]


def test_what_somebody_went_back_to_by_hand_is_not_undone(world: World, names: tuple[str, str]) -> None:
    """The note about what was there before is that of its own promotion, long ago."""
    world.go_back_by_hand()
    world.failing[names[0]] = ReleaseError("smoke check", expected="an answer", got="401", remedy="look")
    with pytest.raises(ReleaseError, match="smoke check"):
        synchronize(world.settings, world.config)
    assert world.now == (names[0], names[0], names[1])
    world.failing.clear()
    assert synchronize(world.settings, world.config) == names[0]
    assert world.now == (names[0],) * 3


def test_what_no_pod_should_be_started_for_is_refused_before(
    world: World, names: tuple[str, str], broken_bundle: Any
) -> None:
    world.promote(0)
    written, serving = len(world.state.written), world.now
    second = world.candidate(1)
    elsewhere = Candidate(second.release, str(broken_bundle), second.manifest)
    manifest = read_manifest(broken_bundle)
    write_manifest(broken_bundle, manifest.model_copy(update={"links": {}}))
    world.offer(1)
    with pytest.raises(ReleaseError, match=rf"file {MANIFEST}: expected SHA-256 .* as it was published"):
        deploy(world.settings, world.config, "urm", elsewhere)
    failed = manifest.model_copy(update={"gate": manifest.gate.model_copy(update={"passed": False})})
    write_manifest(broken_bundle, failed)
    refused = Candidate(second.release, str(broken_bundle), hash_manifest(broken_bundle))
    with pytest.raises(GateError, match=f"release {names[1]}: expected a passed gate"):
        deploy(world.settings, world.config, "urm", refused)
    world.registry.delete_registered_model_alias("urm", CANDIDATE)
    with pytest.raises(ReleaseError, match=r"expected the alias 'candidate', .* got none; promote the candidate"):
        deploy(world.settings, world.config, "urm", second)
    with pytest.raises(ReleaseError, match="release 'urm-no': expected one of the registry"):
        rollback(world.settings, world.config, to="urm-no", why="a test")
    assert world.now == serving
    assert not [one for one in world.state.written[written:] if one.startswith("deployments")]


def test_without_a_replica_nothing_could_serve_it(world: World) -> None:
    world.state.scale(WORKER, 0)
    with pytest.raises(UnavailableError, match="Deployment recall-worker: expected at least one replica, got none"):
        world.promote(0)
    assert world.now == (None, None, None)


def test_a_serving_release_that_nobody_registered_stops_a_promotion(world: World) -> None:
    target = world.target()
    with target.hold(2):
        target.publish("urm-unknown", "/x")
    with pytest.raises(ReleaseError, match="serving release urm-unknown: expected a version of 'urm' in the registry"):
        world.promote(0)
    assert json.loads(world.state.notes(WORKER)["urm.release/previous"] or "null") is None
