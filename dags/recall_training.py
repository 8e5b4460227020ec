"""From behaviour logs to a recall service: trains the universal recommendation model (URM) and promotes it.

1. **ingest**: raw logs → the canonical tables `events` and `items`.
2. **validate**: Great Expectations; bad rows go to the quarantine with a reason.
3. **features**: behaviour sequences in Feast, and task examples by point-in-time retrieval.
4. **encode**: frozen text and image vectors of every item (beside features).
5. **baseline**: a target-attention network, the model to beat, and what stands beside it (popularity, item-kNN, …).
6. **sft**: full-parameter SFT of URM on a pretrained language model.
7. **evaluate**: Recall@K per task on the full catalogue, with paired bootstrap intervals.
8. **gate**: pass or fail by policy. A failure skips what follows; the reasons stand in the log and in the run's note.
9. **release**: one bundle of model, item table, index and tasks, registered in MLflow as `candidate`.
10. **promote**: the recall workers load it beside the serving one, check it, and flip (`champion`) or reject it.

Every stage is `urm <stage> --config … --run-dir …` and leaves its files under the run directory, which is named after
this DAG run. Work that has not changed since an earlier run is reused. The link *MLflow run*, in the run's note and
among a task's details, opens the curves and tables of this run.
"""

from __future__ import annotations

from airflow.sdk import Param, chain, cross_downstream, dag

from dags.run_params import CONFIG, OVERRIDES
from dags.task_factory import stage_task

PARAMS = {
    "config": CONFIG,
    "overrides": OVERRIDES,
    "promote_anyway": Param(
        False,
        type="boolean",
        title="Promote anyway",
        description="Release and promote even if the gate fails; the release is tagged as such.",
    ),
    "force": Param(
        False,
        type="boolean",
        title="Force",
        description="Compute every stage again, even where an equal result exists.",
    ),
}


@dag(
    dag_id="recall_training",
    dag_display_name="recall_training",
    description="Logs → validated features → baseline and URM → evaluation, gate, release, promotion.",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    max_active_runs=1,
    params=PARAMS,
    tags=["urm", "training"],
)
def recall_training() -> None:
    """The graph; what each task does stands in `dags/task_factory.py`."""
    ingest, validate = stage_task("ingest"), stage_task("validate")
    features, encode = stage_task("features"), stage_task("encode")
    baseline, sft = stage_task("baseline"), stage_task("sft")
    evaluate, gate = stage_task("evaluate"), stage_task("gate")
    release, promote = stage_task("release"), stage_task("promote")

    chain(ingest, validate, [features, encode])
    cross_downstream([features, encode], [baseline, sft])
    chain([baseline, sft], evaluate, gate, release, promote)


recall_training()
