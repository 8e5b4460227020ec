"""Stage `gate`: whether the model may be released, by the policy in the configuration, in words."""

import json

import mlflow
import pandas as pd

from components.evaluation.bootstrap import compare
from components.evaluation.policy import judge
from components.evaluation.summary import BASELINE, CANDIDATE
from components.storage import StageReport, StageRun
from components.tracking import parent_run_id


def run(stage: StageRun) -> StageReport:
    """Judge the evaluation; the stage succeeds whether the verdict is pass or fail."""
    config = stage.config.evaluation
    wanted = [("k", "==", config.k), ("model", "in", [CANDIDATE, BASELINE])]
    comparison = compare(
        pd.read_parquet(stage.path("evaluate", "hits"), filters=wanted),
        CANDIDATE,
        BASELINE,
        k=config.k,
        draws=config.bootstrap_samples,
        seed=stage.config.seed,
    )
    verdict = judge(comparison, config)
    (stage.output / "verdict.json").write_text(json.dumps(verdict, indent=2, ensure_ascii=False) + "\n")
    stage.report_progress("gate passed" if verdict["passed"] else "gate failed", mean_lift=comparison.mean_lift)
    client_run = parent_run_id(stage)
    with mlflow.start_run(run_id=client_run, log_system_metrics=False):
        mlflow.set_tags({"urm.gate": "passed" if verdict["passed"] else "failed", "urm.verdict": verdict["verdict"]})
        mlflow.log_metrics({"gate_passed": float(verdict["passed"])})
    return StageReport(outputs={"verdict": "verdict.json"}, metrics=verdict)
