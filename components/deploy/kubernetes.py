"""Roll-out to a cluster: two pod templates name the release, and Kubernetes replaces the pods (ADR 23).

A promotion changes annotations alone, by server-side apply as `urm-promotion`. The manifests do not have them, so that
applying these again changes no release. Pods read them as environment (downward API).

    template    urm.release/name, bundle, manifest, order     what serves; with it, pods are replaced
    Deployment  kubernetes.io/change-cause                    shown by `kubectl rollout history`
                urm.release/previous                          the publication that was there before, JSON; '' for none
                urm.release/…                                 who promoted it and why, run, commit, verdict of the gate

Every write asks for the version that was read before the Lease was looked at. So a promotion that stood still and lost
its Lease either writes before the next one does, which sees it then, or is refused.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import redis
import structlog

from components.deploy.cluster import Cluster, ConflictError, Object
from components.deploy.lease import Lease
from components.deploy.pods import Trouble, find_trouble, is_complete, replicas
from components.deploy.target import overtaken
from components.exceptions import ReleaseError, UnavailableError, UrmError
from components.release.publication import Publication, allot_order, continue_orders

log = structlog.get_logger()

WORKER, AD_HOC = DEPLOYMENTS = ("recall-worker", "recall-adhoc")
CAUSE = "kubernetes.io/change-cause"
_PREFIX = "urm.release/"
_PREVIOUS = _PREFIX + "previous"
# Of a publication: its field → the annotation.
_FIELDS = {"release": "name", "bundle": "bundle", "manifest": "manifest", "order": "order"}
_POLL_SECONDS = 1.0  # a read of both Deployments, and of the pods of one that is not complete
_CONFLICT_TRIES = 30  # the controller writes the status of a Deployment often during a rollout
_CONFLICT_PAUSE_SECONDS = 0.2
_UNDO_SECONDS = 20.0  # for an API that is away just then; a pod that got SIGTERM has little more

# Asks the serving release and measures; whether ad-hoc workers run is told by the second argument.
Check = Callable[[Publication, bool], Mapping[str, float]]


@dataclass(frozen=True)
class _Found:
    """A Deployment as it was read: its release, and the notes about that."""

    publication: Publication | None
    notes: Mapping[str, str]
    deployment: Object


class DeploymentRollout:
    """A `target.Target`: the Deployments `recall-worker` and `recall-adhoc` of one namespace."""

    def __init__(self, cluster: Cluster, client: redis.Redis, check: Check, lease: Lease | None = None) -> None:
        """Take the cluster, the Redis that allots orders, and what a rollout must pass once it is complete."""
        self._cluster, self._client, self._check = cluster, client, check
        self._lease = lease or Lease(cluster)
        self._before: dict[str, _Found] = {}
        self.figures: Mapping[str, float] = {}

    def hold(self, timeout_seconds: float) -> AbstractContextManager[None]:
        """See Target; a Lease."""
        return self._lease.hold(timeout_seconds)

    def require_lock(self) -> None:
        """See Target."""
        self._lease.require()

    def settle(self, champion: str, last_order: int, timeout_seconds: float) -> Publication | None:
        """See Target.

        Where the two Deployments differ, an act was interrupted between them, and the earlier release is applied to
        both. One without a release is earlier only while the first promotion of all is interrupted; else somebody has
        made it anew, and it gets what the other one has. What is no champion becomes so if its rollout gets complete
        and passes the check; else it is undone, but for what somebody went back to by hand.
        """
        found = {name: self._read(name) for name in DEPLOYMENTS}
        kept = min(found.values(), key=lambda one: _order(one.publication))
        if kept.publication is None:
            named = [one for one in found.values() if one.publication is not None]
            kept = next((one for one in named if _was_promoted(one, champion)), kept)
        current = kept.publication
        for name, one in found.items():
            if one.publication == current:
                continue
            log.warning("the two Deployments have different releases", deployment=name, back_to=_name(current))
            notes = {CAUSE: _interrupted(one)} if one.publication else dict(kept.notes)
            self._apply(name, current, notes, one.publication)
        if current is None or current.release == champion:
            return current
        try:
            self.wait(current, timeout_seconds)
        except ReleaseError as error:
            if current.order <= last_order:
                raise  # its promotion was finished, and what it replaced then is no way back
            return self._undo_interrupted(current, error)
        return current

    def publish(
        self, release: str, bundle: str, manifest: str = "", notes: Mapping[str, str] | None = None
    ) -> Publication:
        """See Target; a release that is there already is returned as it is, and no pod is replaced."""
        found = {name: self._read(name) for name in DEPLOYMENTS}
        self._before = {}
        if not replicas(found[WORKER].deployment):
            expected, remedy = "at least one replica", f"scale it up: `kubectl scale deployment {WORKER} --replicas 1`"
            raise UnavailableError(f"Deployment {WORKER}", expected=expected, got="none", remedy=remedy)
        there = found[WORKER].publication
        if there is not None and (there.release, there.bundle, there.manifest) == (release, bundle, manifest):
            return there
        continue_orders(self._client, max(_order(one.publication) for one in found.values()))
        order = allot_order(self._client)
        publication = Publication(release=release, bundle=bundle, manifest=manifest, order=order)
        try:
            for name, before in found.items():
                self._before[name] = before
                self._apply(name, publication, _name_notes(notes or {}, before.publication), before.publication)
        except BaseException:
            self.undo(publication)
            raise
        return publication

    def wait(self, publication: Publication, timeout_seconds: float) -> None:
        """See Target: until both rollouts are complete, and what serves then has passed the check."""
        self._watch(publication, timeout_seconds)
        self.figures = self._check(publication, replicas(self._cluster.read_deployment(AD_HOC)) > 0)

    def undo(self, publication: Publication) -> None:
        """See Target: the former templates exactly, so that pods that are still there need not start again."""
        deadline = time.monotonic() + _UNDO_SECONDS
        while self._before:
            try:
                for name, before in list(self._before.items()):
                    if self._read(name).publication == publication:
                        self._apply(name, before.publication, before.notes, publication)
                    del self._before[name]
            except UnavailableError as error:
                if time.monotonic() > deadline:
                    log.error("not undone; the next promotion or `urm releases sync` does it", error=str(error))
                    return
                time.sleep(_POLL_SECONDS)
            except UrmError as error:  # another promotion has taken over, and does it
                log.error("not undone", error=str(error))
                return

    def _read(self, name: str) -> _Found:
        deployment = self._cluster.read_deployment(name)
        annotations = deployment["metadata"].get("annotations") or {}
        notes = {key: text for key, text in annotations.items() if key == CAUSE or key.startswith(_PREFIX)}
        return _Found(read_template(deployment), notes, deployment)

    def _apply(
        self, name: str, publication: Publication | None, notes: Mapping[str, str], instead_of: Publication | None
    ) -> None:
        """Write a release and its notes, if the Deployment still has the one that it is to replace.

        Raises:
            ReleaseError: It has another, or this promotion has lost its Lease.
        """
        for _ in range(_CONFLICT_TRIES):
            found = self._read(name)
            if found.publication != instead_of:
                raise overtaken(f"Deployment {name}")
            self._lease.require()
            version = found.deployment["metadata"]["resourceVersion"]
            template = {"metadata": {"annotations": write_template(publication)}}
            try:
                self._cluster.apply_deployment(
                    name, {"resourceVersion": version, "annotations": dict(notes)}, {"template": template}
                )
                return
            except ConflictError:
                time.sleep(_CONFLICT_PAUSE_SECONDS)
        raise UnavailableError(
            f"Deployment {name}", expected="a moment without other writes", got="none", remedy="try again later"
        )

    def _watch(self, publication: Publication, timeout_seconds: float) -> None:
        """Return when both rollouts are complete; the API may come and go meanwhile.

        Raises:
            ReleaseError: They cannot be, or are not in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            late = time.monotonic() > deadline
            try:
                self._lease.require()
                trouble = self._find_trouble(publication)
            except UnavailableError:
                if late:
                    raise
            else:
                if trouble is None:
                    return
                if trouble.final or late:
                    raise ReleaseError(
                        f"release {publication.release}",
                        expected=f"every pod of {' and '.join(DEPLOYMENTS)} to serve it within {timeout_seconds:g} s",
                        got=trouble.reason,
                        remedy="fix it and promote again; what served before serves on",
                    )
            time.sleep(_POLL_SECONDS)

    def _find_trouble(self, publication: Publication) -> Trouble | None:
        """Why the rollouts are not complete; None if they are."""
        troubles = []
        for name in DEPLOYMENTS:
            found = self._read(name)
            if found.publication != publication:
                raise overtaken(f"Deployment {name}")
            if not is_complete(found.deployment):
                pods = self._cluster.list_pods(found.deployment["spec"]["selector"]["matchLabels"])
                new = [pod for pod in pods if _is_of(pod, publication)]
                troubles.append(find_trouble(found.deployment, new, self._cluster.list_warnings))
        return min(troubles, key=lambda trouble: not trouble.final, default=None)

    def _undo_interrupted(self, current: Publication, error: ReleaseError) -> Publication | None:
        """Go back to what was there before a promotion that was killed; the publication that serves then."""
        noted = {name: self._read(name).notes.get(_PREVIOUS) for name in DEPLOYMENTS}
        if None in noted.values():
            raise error  # nothing says what was there before
        log.warning("an interrupted promotion is undone", release=current.release, reason=str(error))
        text = noted[WORKER]
        previous = Publication.model_validate_json(text) if text else None
        for name in DEPLOYMENTS:
            self._apply(name, previous, {CAUSE: f"undo of {current.release}, whose promotion was interrupted"}, current)
        return previous


def read_template(deployment: Object) -> Publication | None:
    """The release that a Deployment's pod template names."""
    annotations = deployment["spec"]["template"]["metadata"].get("annotations") or {}
    values = {field: annotations.get(_PREFIX + key, "") for field, key in _FIELDS.items()}
    return Publication.model_validate(values) if values["release"] else None


def write_template(publication: Publication | None) -> dict[str, str]:
    """Annotations of a pod template that name a release; empty for none."""
    if publication is None:
        return {}
    return {_PREFIX + key: str(getattr(publication, field)) for field, key in _FIELDS.items()}


def _name_notes(notes: Mapping[str, str], before: Publication | None) -> dict[str, str]:
    """Notes as annotations; `cause` is the one that kubectl shows."""
    named = {CAUSE if key == "cause" else _PREFIX + key: text for key, text in notes.items()}
    return named | {_PREVIOUS: "" if before is None else json.dumps(before.model_dump())}


def _is_of(pod: Object, publication: Publication) -> bool:
    annotations = pod["metadata"].get("annotations") or {}
    going = "deletionTimestamp" in pod["metadata"]
    return annotations.get(_PREFIX + "order") == str(publication.order) and not going


def _order(publication: Publication | None) -> int:
    return -1 if publication is None else publication.order


def _name(publication: Publication | None) -> str:
    return "no release" if publication is None else publication.release


def _was_promoted(found: _Found, champion: str) -> bool:
    """Whether a Deployment's release is not that of a first promotion on its way."""
    return found.publication is not None and (found.publication.release == champion or bool(found.notes.get(_PREVIOUS)))


def _interrupted(found: _Found) -> str:
    return f"undo of {_name(found.publication)}, which only one of the two Deployments had"
