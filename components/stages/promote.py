"""Stage `promote`: ask the workers for a release, and crown it in the registry once they all serve it."""

from __future__ import annotations

import json

import mlflow

from components.deploy.promotion import deploy
from components.storage import StageReport, StageRun
from components.tracking import track


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
