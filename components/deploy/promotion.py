"""Promotion: roll a release out, and make it the champion of the registry once it serves."""

from __future__ import annotations

import time
from typing import Any

import structlog

from components.addresses import exists
from components.config import ReleaseConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import MissingInputError
from components.redis_client import open_redis, redis_errors
from components.release.registry import PREVIOUS, crown, open_registry, require_alias
from components.settings import Settings

log = structlog.get_logger()


def rollback(settings: Settings, config: ReleaseConfig) -> dict[str, Any]:
    """Promote the version with the alias `previous`; the champion becomes `previous`.

    Raises:
        ReleaseError: There is no previous release, or a worker rejected it.
        UnavailableError: Redis, MLflow or every worker is away.
    """
    version = require_alias(open_registry(settings), config.model_name, PREVIOUS)
    return deploy(
        settings,
        config,
        model_name=config.model_name,
        version=str(version.version),
        release=version.tags["urm.release"],
        bundle=version.tags["urm.bundle"],
    )


def deploy(
    settings: Settings, config: ReleaseConfig, *, model_name: str, version: str, release: str, bundle: str
) -> dict[str, Any]:
    """Roll a registered release out and crown it.

    Returns:
        Content of the file `deployment`.
    """
    started = time.monotonic()
    registry = open_registry(settings)
    if not exists(bundle):
        raise MissingInputError(
            f"release {release}", expected=f"its bundle at {bundle}", got="nothing", remedy="run `urm release` again"
        )
    client = open_redis(settings.redis_url)
    with redis_errors(settings.redis_url):
        publication = roll_out(WorkerFlip(client), release, bundle, config.promote_timeout_seconds)
    previous = crown(registry, model_name, version)
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
