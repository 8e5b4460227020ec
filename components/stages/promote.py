"""Stage `promote`: roll the run's release out, and make it the champion of the registry once it serves."""

import json

import mlflow

from components.deploy.promotion import Candidate, deploy
from components.storage import StageReport, StageRun
from components.tracking import track


def run(stage: StageRun) -> StageReport:
    """Promote the run's release.

    Raises:
        UnavailableError: A service or every worker is away, or another promotion goes on.
        ReleaseError: It was rejected, or there was no answer in time; what served before serves on.
    """
    released = stage.inputs["release"]
    stage.report_progress("rolling the release out")
    deployment = deploy(
        stage.settings,
        stage.config.release,
        released.metrics["model_name"],
        Candidate(
            released.metrics["release"],
            released.outputs["bundle"],
            released.metrics.get("manifest", ""),
        ),
        stage.config.recall,
    )
    (stage.output / "deployment.json").write_text(json.dumps(deployment, indent=2) + "\n")
    with track(stage):
        mlflow.set_tags({f"urm.{key}": str(value) for key, value in deployment.items()})
        mlflow.log_metric("promote_seconds", deployment["seconds"])
    return StageReport(outputs={"deployment": "deployment.json"}, metrics=deployment)
