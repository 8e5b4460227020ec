"""Promotion: roll a release out, and make it the champion of the registry once it serves.

One promotion runs at a time. What serves and what the registry calls champion may part where one was killed in between;
the next one begins with putting that right, so that `previous` is always what served before.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
import structlog
from mlflow import MlflowClient
from redis.exceptions import LockError

from components.addresses import exists
from components.config import ReleaseConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import MissingInputError, ReleaseError
from components.redis_client import open_redis, redis_errors
from components.release.publication import SERVING, continue_orders, hold_promotion_lock, read_answers, read_publication
from components.release.registry import (
    CHAMPION,
    PREVIOUS,
    crown,
    find_version,
    last_order,
    open_registry,
    require_alias,
    version_of_alias,
)
from components.settings import Settings

log = structlog.get_logger()


@dataclass(frozen=True)
class Candidate:
    """A registered release.

    Attributes:
        version: Its version of the registered model.
        release: Its name.
        bundle: URI of its bundle.
        manifest: SHA-256 of its manifest, as its stage noted it; empty if that was before digests were noted.
    """

    version: str
    release: str
    bundle: str
    manifest: str = ""


def rollback(settings: Settings, config: ReleaseConfig) -> dict[str, Any]:
    """Promote the version that served before; the champion becomes `previous`.

    Raises:
        ReleaseError: There is no previous release, or a worker rejected it.
        UnavailableError: Redis, MLflow or every worker is away, or another promotion goes on.
    """

    def choose(registry: MlflowClient) -> Candidate:
        version = require_alias(registry, config.model_name, PREVIOUS)
        return Candidate(str(version.version), version.tags["urm.release"], version.tags["urm.bundle"])

    return _promote(settings, config, config.model_name, choose)


def deploy(settings: Settings, config: ReleaseConfig, model_name: str, candidate: Candidate) -> dict[str, Any]:
    """Roll a registered release out and make it the champion.

    Returns:
        Content of the file `deployment`.

    Raises:
        MissingInputError: Its bundle is gone.
        ReleaseError: A worker rejected it or did not answer.
        UnavailableError: Redis, MLflow or every worker is away, or another promotion goes on.
    """
    return _promote(settings, config, model_name, lambda _: candidate)


def _promote(
    settings: Settings, config: ReleaseConfig, model_name: str, choose: Callable[[MlflowClient], Candidate]
) -> dict[str, Any]:
    started = time.monotonic()
    registry, client = open_registry(settings), open_redis(settings.redis_url)
    timeout = config.promote_timeout_seconds
    with redis_errors(settings.redis_url), hold_promotion_lock(client, timeout) as lock:
        _repair(registry, client, model_name)
        candidate = choose(registry)
        release, version = candidate.release, candidate.version
        if not exists(candidate.bundle):
            expected, remedy = f"its bundle at {candidate.bundle}", "run `urm release` again"
            raise MissingInputError(f"release {release}", expected=expected, got="nothing", remedy=remedy)
        continue_orders(client, last_order(registry, model_name))
        # The registry's word counts, unless equal content was registered again since, from another run.
        tags = registry.get_model_version(model_name, version).tags
        registered = tags.get("urm.bundle") == candidate.bundle and tags.get("urm.manifest")
        manifest = registered or candidate.manifest
        try:
            publication = roll_out(WorkerFlip(client, lock), release, candidate.bundle, timeout, manifest)
            lock.reacquire()
        except LockError:
            raise ReleaseError(
                f"release {release}",
                expected="the only promotion",
                got="another one, which took over when this one stood still",
                remedy="see what serves, and promote again if that is not what you want",
            ) from None
        previous = crown(registry, model_name, version, publication.order)
    seconds = round(time.monotonic() - started, 3)
    log.info("promoted", release=release, version=version, previous=previous, seconds=seconds)
    return {
        "release": release,
        "version": version,
        "previous": previous,
        "outcome": "serving",
        "order": publication.order,
        "seconds": seconds,
    }


def _repair(registry: MlflowClient, client: redis.Redis, model_name: str) -> None:
    """Make the release that serves the champion, where a promotion was killed between the two."""
    serving = read_publication(client, SERVING)
    version = None if serving is None else find_version(registry, model_name, serving.release)
    champion = version_of_alias(registry, model_name, CHAMPION)
    if serving is None or version is None or (champion is not None and str(champion.version) == version):
        return
    if any(given.outcome == "rejected" for given in read_answers(client, serving).values()):
        return  # that promotion failed, and was killed before it could undo itself
    log.warning("a promotion was killed before it made the release champion", release=serving.release, version=version)
    crown(registry, model_name, version, serving.order)
