"""Stage `gate`: whether the model may be released, by the policy in the configuration, in words."""

import json
from collections.abc import Iterable
from functools import partial

import mlflow

from components.evaluation.bootstrap import compare
from components.evaluation.policy import judge
from components.evaluation.summary import BASELINE, CANDIDATE
from components.schemas.hits import read_hits
from components.storage import StageReport, StageResult, StageRun
from components.storage.results import find_others
from components.tracking import parent_run_id


def run(stage: StageRun) -> StageReport:
    """Judge the evaluation; the stage succeeds whether the verdict is pass or fail."""
    config = stage.config.evaluation
    other = stage.metric("evaluate", "best_other")["model"]
    hits = read_hits(str(stage.path("evaluate", "hits")), config.k, {CANDIDATE, BASELINE, other})
    against = partial(compare, hits, CANDIDATE, k=config.k, draws=config.bootstrap_samples, seed=stage.config.seed)
    comparison = against(BASELINE)
    best = comparison if other == BASELINE else against(other)
    evaluation = stage.inputs["evaluate"]
    earlier = _earlier_lifts(evaluation, find_others(stage.run_dir, evaluation))
    verdict = judge(comparison, best, stage.config, stage.metric("evaluate", "cut_short"), earlier)
    (stage.output / "verdict.json").write_text(json.dumps(verdict, indent=2, ensure_ascii=False) + "\n")
    stage.report_progress("gate passed" if verdict["passed"] else "gate failed", reasons=len(verdict["reasons"]))
    client_run = parent_run_id(stage)
    with mlflow.start_run(run_id=client_run, log_system_metrics=False):
        mlflow.set_tags({"urm.gate": "passed" if verdict["passed"] else "failed", "urm.verdict": verdict["verdict"]})
        mlflow.log_metrics({"gate_passed": float(verdict["passed"])})
    return StageReport(outputs={"verdict": "verdict.json"}, metrics=verdict)


def _earlier_lifts(evaluation: StageResult, others: Iterable[StageResult]) -> list[float]:
    """Lifts of other trainings by equal settings on as many items: the newest of each other seed."""
    same, lifts = ("settings", "k"), {evaluation.metrics["seed"]: evaluation.metrics["lift"]}
    for other in others:
        equal = all(other.metrics.get(name) == evaluation.metrics[name] for name in same)
        if equal and other.counts["items"] == evaluation.counts["items"]:
            lifts.setdefault(other.metrics["seed"], other.metrics["lift"])
    return [lift for seed, lift in lifts.items() if seed != evaluation.metrics["seed"] and lift is not None]
