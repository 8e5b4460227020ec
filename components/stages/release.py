"""Stage `release`: bundle model, item table, index and tasks under one manifest; register it as the candidate."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import mlflow

from components.addresses import join
from components.exceptions import GateError
from components.release.assemble import assemble
from components.release.bundle import GateVerdict, Manifest, describe_files, name_release, write_manifest
from components.release.registry import register
from components.storage import StageReport, StageRun
from components.tracking import run_url, track


def run(stage: StageRun) -> StageReport:
    """Build and register the release.

    Raises:
        GateError: The gate failed and nobody said to go on anyway.
        ReleaseError: The inputs do not fit together.
    """
    gate = judge(stage)
    bundle = stage.output / "bundle"
    stage.report_progress("assembling the bundle")
    counts, index = assemble(stage, bundle)
    stage.report_progress("hashing its files")
    files = describe_files(bundle)
    with track(stage) as run:
        manifest = Manifest(
            release=name_release(stage.config.release.model_name, files),
            created_at=datetime.now(UTC),
            config=stage.config.name,
            files=files,
            feature_store=stage.inputs["features"].outputs["feature_store"],
            gate=gate,
            links=_links(stage, run.info.run_id, run.info.experiment_id),
            history_length=stage.config.features.history_length,
            day_origin=stage.config.features.split.train_start,
            index=index,
        )
        write_manifest(bundle, manifest)
        uri = join(stage.folder, "bundle")
        tags = _tags(manifest, uri)
        stage.report_progress("registering it in MLflow")
        version = register(bundle, uri, manifest, stage.config.release.model_name, tags)
        mlflow.set_tags({**tags, "urm.version": version})
        mlflow.log_metric("index_recall", index.recall)
        mlflow.log_artifact(str(bundle / "manifest.json"))
    return StageReport(
        outputs={"bundle": "bundle"},
        counts={"files": len(files), "bytes": sum(entry.size for entry in files.values()), **counts},
        metrics={
            "release": manifest.release,
            "model_name": stage.config.release.model_name,
            "version": version,
            "gate_passed": gate.passed,
            "promoted_anyway": gate.promoted_anyway,
            "index": index.kind,
            "index_recall": index.recall,
        },
    )


def judge(stage: StageRun) -> GateVerdict:
    """The gate's verdict, if it allows a release.

    Raises:
        GateError: It does not, and nobody said to go on anyway.
    """
    metrics = stage.inputs["gate"].metrics
    content = json.loads(stage.path("gate", "verdict").read_text())
    passed, anyway = bool(metrics["passed"]), bool(stage.options.get("promote_anyway"))
    if not passed and not anyway:
        raise GateError(
            "release",
            expected="a passed gate",
            got="a failed one: " + "; ".join(str(reason).rstrip(".") for reason in content["reasons"]),
            remedy="improve the model, or see the rest of the chain with --promote-anyway",
        )
    return GateVerdict(passed=passed, verdict=content["verdict"], promoted_anyway=anyway and not passed)


def _links(stage: StageRun, run_id: str, experiment_id: str) -> dict[str, str]:
    settings = stage.settings
    links = {"run_dir": stage.run_dir, "mlflow_run_id": run_id, "mlflow_run": run_url(stage, run_id, experiment_id)}
    if settings.airflow_run_id:
        links["airflow_dag_id"] = settings.airflow_dag_id
        links["airflow_run_id"] = settings.airflow_run_id
        links["airflow_run"] = f"{settings.airflow_url}/dags/{settings.airflow_dag_id}/runs/{settings.airflow_run_id}"
    return links


def _tags(manifest: Manifest, uri: str) -> dict[str, str]:
    gate = manifest.gate
    return {
        "urm.release": manifest.release,
        "urm.bundle": uri,
        "urm.config": manifest.config,
        "urm.gate": "passed" if gate.passed else "failed, promoted anyway",
        "urm.gate_verdict": gate.verdict[:5000],
        **{f"urm.{name}": link for name, link in manifest.links.items()},
    }
