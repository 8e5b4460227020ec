"""Stage `release`: bundle model, item table, index and tasks under one manifest; register it as the candidate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import mlflow

from components.addresses import fetch, join
from components.device import prepare_device
from components.features.store import hash_registry
from components.release.assemble import BundleSources, assemble
from components.release.bundle import (
    MANIFEST,
    GateVerdict,
    Manifest,
    describe_files,
    hash_manifest,
    name_release,
    write_manifest,
)
from components.release.registry import register
from components.settings import Settings
from components.storage import StageReport, StageRun
from components.tracking import track


@dataclass(frozen=True)
class ReleaseInputs:
    """What the stage reads: the parts of the bundle, the gate's verdict, and the URI of the Feast folder."""

    sources: BundleSources
    verdict: dict[str, Any]
    feature_store: str

    @classmethod
    def read(cls, stage: StageRun) -> ReleaseInputs:
        """Take them from the earlier stages."""
        sources = BundleSources(
            model=stage.path("sft", "model"),
            item_table=stage.path("sft", "item_table"),
            candidates=stage.path("sft", "candidates"),
            items=stage.path("validate", "items"),
            popularity=stage.path("baseline", "popularity"),
            predictions=stage.path("evaluate", "predictions"),
            examples=stage.path("features", "examples"),
            contexts=stage.path("features", "contexts"),
        )
        verdict = json.loads(stage.path("gate", "verdict").read_text())
        return cls(sources, verdict, stage.inputs["features"].outputs["feature_store"])


def run(stage: StageRun) -> StageReport:
    """Build and register the release.

    Raises:
        GateError: The gate failed and `promote_anyway` is not set.
        ReleaseError: The inputs do not fit together.
    """
    config, device, inputs = stage.config, prepare_device(stage.settings), ReleaseInputs.read(stage)
    gate = GateVerdict.judge(inputs.verdict, bool(stage.options.get("promote_anyway")))
    bundle = stage.output / "bundle"
    stage.report_progress("assembling the bundle")
    counts, index = assemble(inputs.sources, config, device, bundle, stage.report_progress)
    stage.report_progress("hashing its files")
    files = describe_files(bundle)
    with track(stage, resume=True) as run:
        manifest = Manifest(
            release=name_release(config.release.model_name, files),
            created_at=datetime.now(UTC),
            config=config.name,
            files=files,
            feature_store=inputs.feature_store,
            gate=gate,
            links=_links(stage, run.info.run_id, run.info.experiment_id),
            history_length=config.features.history_length,
            day_origin=config.features.split.train_start,
            index=index,
            feature_registry=_hash_registry(inputs.feature_store, stage.settings),
        )
        write_manifest(bundle, manifest)
        mlflow.log_metric("index_recall", index.recall)
        mlflow.log_artifact(str(bundle / "manifest.json"))
    digest = hash_manifest(bundle)
    stage.report_progress("putting the bundle in its place")
    return StageReport(
        outputs={"bundle": "bundle"},
        counts={"files": len(files), "bytes": sum(entry.size for entry in files.values()), **counts},
        metrics={
            "release": manifest.release,
            "manifest": digest,
            "model_name": config.release.model_name,
            "gate_passed": gate.passed,
            "promoted_anyway": gate.promoted_anyway,
            "index": index.kind,
            "index_recall": index.recall,
        },
        announce=lambda: {"version": _register(stage, manifest, digest)},
    )


def _register(stage: StageRun, manifest: Manifest, digest: str) -> str:
    """Make the release the registry's candidate, now that its bundle can be fetched; returns its version."""
    uri = join(stage.folder, "bundle")
    bundle = fetch(uri, stage.settings.cache_path / "bundles" / f"{digest[:16]}-manifest", (MANIFEST,))
    tags = {**manifest.tags(uri), "urm.manifest": digest}
    stage.report_progress("registering it in MLflow")
    with track(stage, resume=True):
        version = register(bundle, uri, manifest, stage.config.release.model_name, tags)
        mlflow.set_tags({**tags, "urm.version": version})
    return version


def _links(stage: StageRun, run_id: str, experiment_id: str) -> dict[str, str]:
    settings = stage.settings
    links = {"run_dir": stage.run_dir, "mlflow_run_id": run_id, "mlflow_run": settings.run_page(experiment_id, run_id)}
    if settings.airflow_run_id:
        links["airflow_dag_id"] = settings.airflow_dag_id
        links["airflow_run_id"] = settings.airflow_run_id
        links["airflow_run"] = f"{settings.airflow_url}/dags/{settings.airflow_dag_id}/runs/{settings.airflow_run_id}"
    return links


def _hash_registry(feature_store: str, settings: Settings) -> str:
    return hash_registry(fetch(feature_store, settings.cache_path / "features", ("registry.db",)))
