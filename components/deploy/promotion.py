"""Promotion: roll a release out, and make it the champion of the registry once it serves.

One promotion runs at a time. What serves and what the registry calls champion may part where one was killed in between,
or where somebody rolled back by hand; the next one, or `urm releases sync`, begins with putting that right, so that
`previous` is always what served before.
"""

import getpass
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from redis.exceptions import LockError

from components.addresses import exists, fetch
from components.config import RecallConfig, ReleaseConfig
from components.deploy.target import Target, overtaken, roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import GateError, MissingInputError, ReleaseError
from components.mlflow_server import mlflow_errors
from components.redis_client import open_redis, redis_errors
from components.release.bundle import MANIFEST, read_manifest
from components.release.publication import Publication, continue_orders
from components.release.registry import (
    CANDIDATE,
    CHAMPION,
    PREVIOUS,
    PROMOTION_TAG,
    crown,
    find_version,
    last_order,
    open_registry,
    release_of,
    require_alias,
    require_version,
    version_of_alias,
)
from components.settings import Settings

log = structlog.get_logger()
_NOTE_LENGTH = 500  # characters of a text in an annotation
_COMMIT_TAG = "mlflow.source.git.commit"


@dataclass(frozen=True)
class Candidate:
    """A registered release.

    Attributes:
        release: Its name, by which the registry is asked for its version.
        bundle: URI of its bundle.
        manifest: SHA-256 of its manifest, as its stage noted it; empty if that was before digests were noted.
        fresh: Whether it must be the registry's candidate, or the champion already; not so for a way back.
    """

    release: str
    bundle: str
    manifest: str = ""
    fresh: bool = True


def rollback(
    settings: Settings,
    config: ReleaseConfig,
    recall: RecallConfig | None = None,
    *,
    to: str = "",
    why: str = "rollback",
) -> dict[str, Any]:
    """Promote an earlier release, by default the one that served before; the champion becomes `previous`.

    Raises:
        ReleaseError: There is no such release, or it was rejected.
        UnavailableError: Redis, MLflow or every worker is away, or another promotion goes on.
    """

    def choose(registry: MlflowClient) -> Candidate:
        name = config.model_name
        if to:
            number = find_version(registry, name, to)
            if number is None:
                raise ReleaseError(
                    f"release {to!r}", expected="one of the registry", got="none", remedy="see `urm releases`"
                )
            version = registry.get_model_version(name, number)
        else:
            version = require_alias(registry, name, PREVIOUS)
        return Candidate(version.tags["urm.release"], version.tags["urm.bundle"], fresh=False)

    return _promote(settings, config, recall, config.model_name, choose, why, by_alias=not to)


def deploy(
    settings: Settings,
    config: ReleaseConfig,
    model_name: str,
    candidate: Candidate,
    recall: RecallConfig | None = None,
) -> dict[str, Any]:
    """Roll a registered release out and make it the champion.

    Args:
        settings: Where; `deploy_to` says what is changed.
        config: Section `release` of the run.
        model_name: Name of the registered model.
        candidate: What.
        recall: Section `recall` that the workers have, too; for the smoke check on a cluster.

    Returns:
        Content of the file `deployment`.

    Raises:
        MissingInputError: Its bundle is gone.
        ReleaseError: It was rejected, or there was no answer.
        UnavailableError: Redis, MLflow or every worker is away, or another promotion goes on.
    """
    return _promote(settings, config, recall, model_name, lambda _: candidate, "promotion")


def synchronize(settings: Settings, config: ReleaseConfig, recall: RecallConfig | None = None) -> str | None:
    """Make the release that serves the champion, if it is not; the release, or None if nothing serves.

    Raises:
        ReleaseError: What serves is not registered, or is the remains of a promotion that cannot be undone.
        UnavailableError: A service is away, or a promotion goes on.
    """
    registry, target = open_registry(settings), open_target(settings, config, recall)
    timeout = config.promote_timeout_seconds
    with mlflow_errors(settings.tracking_uri), redis_errors(settings.redis_url), target.hold(timeout):
        found = _repair(config, registry, target, config.model_name, must_be_registered=True)
    return None if found is None else found.release


def open_target(settings: Settings, config: ReleaseConfig, recall: RecallConfig | None = None) -> Target:
    """What `deploy_to` says: the workers of one machine, or the Deployments of a cluster."""
    client = open_redis(settings.redis_url)
    if settings.deploy_to == "local":
        return WorkerFlip(client)
    # Neither the client nor the model is needed elsewhere.
    from components.deploy.cluster import Cluster
    from components.deploy.kubernetes import DeploymentRollout
    from components.deploy.smoke import SmokeCheck

    check = SmokeCheck(settings, config, recall or RecallConfig(), client)
    return DeploymentRollout(Cluster.open(settings.namespace), client, check)


def _promote(
    settings: Settings,
    config: ReleaseConfig,
    recall: RecallConfig | None,
    model_name: str,
    choose: Callable[[MlflowClient], Candidate],
    why: str,
    *,
    by_alias: bool = False,
) -> dict[str, Any]:
    """Promote what `choose` names; with `by_alias` that is known only once the aliases say what serves."""
    started = time.monotonic()
    registry, target = open_registry(settings), open_target(settings, config, recall)
    timeout = config.promote_timeout_seconds
    with mlflow_errors(settings.tracking_uri), redis_errors(settings.redis_url), target.hold(timeout):
        on_cluster = settings.deploy_to == "kubernetes"
        chosen = None if by_alias else _check(settings, registry, model_name, choose(registry))
        found = _repair(config, registry, target, model_name, must_be_registered=on_cluster)
        candidate, version, manifest = chosen or _check(settings, registry, model_name, choose(registry))
        if on_cluster and candidate.fresh:
            _require_named(registry, model_name, candidate.release)
        release = candidate.release
        continue_orders(open_redis(settings.redis_url), last_order(registry, model_name))
        act = {"by": _name_caller(settings), "why": why, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        notes = _describe(registry, model_name, version, act)
        try:
            publication = roll_out(target, release, candidate.bundle, timeout, manifest, notes)
            target.require_lock()
        except LockError:
            raise overtaken(f"release {release}") from None
        # What served already was put right above, with a number that may be an earlier one, of a rollback by hand.
        order = publication.order if publication != found else max(publication.order, last_order(registry, model_name))
        previous = crown(registry, model_name, version, order)
        seconds = round(time.monotonic() - started, 3)
        if publication != found:
            note = {**act, "seconds": seconds, **target.figures}
            key = f"{PROMOTION_TAG}{publication.order}"
            registry.set_model_version_tag(model_name, version, key, json.dumps(note))
    log.info("promoted", release=release, version=version, previous=previous, seconds=seconds)
    return {
        "release": release,
        "version": version,
        "previous": previous,
        "outcome": "serving",
        "order": publication.order,
        "seconds": seconds,
        **target.figures,
    }


def _repair(
    config: ReleaseConfig, registry: MlflowClient, target: Target, model_name: str, *, must_be_registered: bool
) -> Publication | None:
    """Make the release that serves the champion, where a promotion was killed between the two or somebody went back.

    Returns:
        What serves; None if nothing does, or nothing that can be told.

    Raises:
        ReleaseError: What serves is not registered and must be: on a cluster no way back to it would be.
    """
    champion = version_of_alias(registry, model_name, CHAMPION)
    order = 0 if champion is None else last_order(registry, model_name)
    found = target.settle(release_of(champion), order, config.promote_timeout_seconds)
    version = None if found is None else find_version(registry, model_name, found.release)
    if found is None or version is None:
        if found is not None and must_be_registered:
            expected, remedy = f"a version of {model_name!r} in the registry", "set URM_MLFLOW_URI to its registry"
            raise ReleaseError(f"serving release {found.release}", expected=expected, got="none", remedy=remedy)
        return found
    if release_of(champion) != found.release:
        log.warning("what serves was not the champion, and is made so", release=found.release, version=version)
        try:
            target.require_lock()
        except LockError:
            raise overtaken(f"release {found.release}") from None
        crown(registry, model_name, version, max(found.order, order))
    return found


def _check(
    settings: Settings, registry: MlflowClient, model_name: str, candidate: Candidate
) -> tuple[Candidate, str, str]:
    """Refuse what cannot be served, whatever serves now; changes nothing.

    Returns:
        The candidate, its version, and the digest of its manifest; empty if nothing is known of that.

    Raises:
        MissingInputError: Its bundle is gone.
        ReleaseError: It is not registered, or, on a cluster, its manifest is not the one that was.
        GateError: On a cluster: the gate refused it.
    """
    if not exists(candidate.bundle):
        expected, remedy = f"its bundle at {candidate.bundle}", "run `urm release` again"
        raise MissingInputError(f"release {candidate.release}", expected=expected, got="nothing", remedy=remedy)
    found = require_version(registry, model_name, candidate.release)
    # The registry's word counts, unless equal content was registered again since, from another run.
    registered = found.tags.get("urm.bundle") == candidate.bundle and found.tags.get("urm.manifest")
    manifest = registered or candidate.manifest
    if settings.deploy_to == "kubernetes":  # the workers of one machine refuse it before anything changes
        _require_promotable(settings, candidate, manifest)
    return candidate, str(found.version), manifest


def _require_promotable(settings: Settings, candidate: Candidate, manifest: str) -> None:
    """Refuse what no pod should be started for.

    Raises:
        ReleaseError: The manifest is not the one that was registered.
        GateError: The gate refused it.
    """
    settings.require_allowed(candidate.bundle)
    subject = f"release {candidate.release}"
    if not manifest:
        remedy = "build it again with `urm release`"
        raise ReleaseError(subject, expected="a registered digest of its manifest", got="none", remedy=remedy)
    cache = settings.cache_path / "bundles" / f"{manifest[:16]}-manifest"
    content = read_manifest(fetch(candidate.bundle, cache, (MANIFEST,)), manifest)
    content.require(candidate.release, candidate.bundle)
    if not (content.gate.passed or content.gate.promoted_anyway):
        remedy = "build it again with `urm release --promote-anyway`"
        raise GateError(subject, expected="a passed gate", got=content.gate.verdict, remedy=remedy)


def _require_named(registry: MlflowClient, model_name: str, release: str) -> None:
    """Refuse a release that is no candidate any more, now that the aliases say what serves.

    Raises:
        ReleaseError: It is neither candidate nor champion.
    """
    named = {alias: version_of_alias(registry, model_name, alias) for alias in (CANDIDATE, CHAMPION)}
    if release not in map(release_of, named.values()):
        now = named[CANDIDATE]
        raise ReleaseError(
            f"release {release}",
            expected=f"the alias {CANDIDATE!r}, or {CHAMPION!r} already",
            got="none" if now is None else f"a newer candidate, {release_of(now)}",
            remedy=f"promote the candidate, or go back on purpose: `urm rollback --to {release} --why …`",
        )


def _describe(registry: MlflowClient, model_name: str, version: str, act: Mapping[str, str]) -> dict[str, str]:
    """Notes of a promotion for people who look at the target: who, why, run, commit, what the gate said."""
    found = registry.get_model_version(model_name, version)
    tags = found.tags
    release, gate = tags.get("urm.release", ""), tags.get("urm.gate", "")
    return {
        **act,
        "cause": f"{act['why']}: {release} (gate {gate or 'unknown'}), by {act['by']}",
        "run": tags.get("urm.mlflow_run_id", ""),
        "airflow-run": tags.get("urm.airflow_run_id", ""),
        "commit": _find_commit(registry, found.run_id),
        "gate": gate,
        "figures": tags.get("urm.gate_verdict", "")[:_NOTE_LENGTH],
    }


def _find_commit(registry: MlflowClient, run_id: str | None) -> str:
    """Commit of the code that made a version, as far as MLflow knows it."""
    try:
        return str(registry.get_run(run_id).data.tags.get(_COMMIT_TAG, "")) if run_id else ""
    except MlflowException:  # its run was deleted
        return ""


def _name_caller(settings: Settings) -> str:
    """Who promotes: a DAG run, or a user of a machine."""
    if settings.airflow_run_id:
        return f"{settings.airflow_dag_id}/{settings.airflow_run_id}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
