"""Gives every user known from training results of the release that serves; live events come first.

1. **backfill**: `urm recall backfill`. On one machine it is a process of the lowest priority; on a cluster an Indexed
   Job, whose pods share the users by a hash. Progress, users per second and the time left are in its log.

A promotion refreshes nobody: each user keeps the results of the release before until the next event. While this DAG is
not paused, it runs after every promotion and rollback by the other DAGs, which update the asset *serving_release*. It
starts paused, since computing all users takes long. A run by hand does the same at any time: whoever has results of the
release keeps them.
"""

import sys
from pathlib import Path

from airflow.sdk import Param, dag

sys.path.append(str(Path(__file__).parents[1]))  # Airflow adds a bundle's root, which may be this folder

from dags.common.params import CONFIG, SERVING_RELEASE
from dags.common.tasks import backfill_task

PARAMS = {
    "config": Param(
        None,
        type=["string", "null"],  # the form sends null for an empty field
        pattern=CONFIG.schema["pattern"],
        title="Configuration",
        description="Name of a file in configs/, without .yaml; empty: that of the promotion which the run follows, "
        "or of URM_CONFIG.",
    ),
    "rate": Param(
        0, type="number", minimum=0, title="Rate", description="Most users to compute per second; 0: no limit."
    ),
    "shards": Param(
        2, type="integer", minimum=1, maximum=1000, title="Shards", description="Parts of the users; on a cluster."
    ),
    "pods": Param(2, type="integer", minimum=1, title="Pods", description="Shards at a time; on a cluster."),
}


@dag(
    dag_id="recall_backfill",
    dag_display_name="recall_backfill",
    description="All known users get results of the release that serves.",
    doc_md=__doc__,
    schedule=[SERVING_RELEASE],
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=True,
    params=PARAMS,
    tags=["urm", "serving"],
)
def recall_backfill() -> None:
    """The graph: one command."""
    backfill_task()


recall_backfill()
