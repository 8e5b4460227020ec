"""From behaviour logs to a recall service: trains the universal recommendation model (URM) and promotes it.

Every stage is `urm <stage> --config … --run-dir …` and leaves its files under the run directory, which is named after
this DAG run. Work that has not changed since an earlier run is reused. The link *MLflow run*, in the run's note and
among a task's details, opens the curves and tables of this run.
"""

import sys
from pathlib import Path

from airflow.sdk import dag

sys.path.append(str(Path(__file__).parents[1]))  # Airflow adds a bundle's root, which may be this folder

from dags.common.params import CONFIG, FORCE, OVERRIDES
from dags.common.tasks import describe_stages, flag_params, stage_tasks

FLOW = "recall_training"


@dag(
    dag_id="recall_training",
    dag_display_name="recall_training",
    description="Logs → validated features → baseline and URM → evaluation, gate, release, promotion.",
    doc_md=f"{__doc__}\n{describe_stages(FLOW)}",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    params={"config": CONFIG, "overrides": OVERRIDES, "force": FORCE, **flag_params(FLOW)},
    tags=["urm", "training"],
)
def recall_training() -> None:
    """The graph: `components/flow.py` tells its stages, and what each reads."""
    stage_tasks(FLOW)


recall_training()
