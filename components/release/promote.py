"""Stage `promote`: ask the workers for a release, and crown it in the registry once they all serve it."""

from __future__ import annotations

import json
import time
from typing import Any

import mlflow
import structlog

from components.addresses import exists
from components.config import ReleaseConfig
from components.exceptions import MissingInputError
from components.release.redis_client import open_redis, redis_errors
from components.release.registry import PREVIOUS, crown, open_registry, require_alias
from components.release.rollout import roll_out
from components.settings import Settings
from components.storage import StageReport, StageRun
from components.tracking import track

log = structlog.get_logger()


def run(stage: StageRun) -> StageReport:
    """Promote the run's release.

    Raises:
        UnavailableError: Redis, MLflow or every worker is away.
        ReleaseError: A worker rejected the release or did not answer; the wanted release is the one before again.
    """
    released = stage.inputs["release"]
    name, version = released.metrics["model_name"], released.metrics["version"]
    stage.report_progress("asking the workers for the release")
    deployment = deploy(
        stage.settings,
        stage.config.release,
        model_name=name,
        version=version,
        release=released.metrics["release"],
        bundle=released.outputs["bundle"],
    )
    (stage.output / "deployment.json").write_text(json.dumps(deployment, indent=2) + "\n")
    with track(stage):
        mlflow.set_tags({f"urm.{key}": str(value) for key, value in deployment.items()})
        mlflow.log_metric("promote_seconds", deployment["seconds"])
    return StageReport(outputs={"deployment": "deployment.json"}, metrics=deployment)


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
        publication = roll_out(client, release, bundle, config.promote_timeout_seconds)
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
