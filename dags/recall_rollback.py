"""Brings an earlier release back: the same as `urm rollback`, with a form that asks to which one, and why.

1. **rollback**: rolls the release out like any promotion, checks what serves then, and moves the aliases in MLflow.
   If it fails, what served before serves on. *MLflow → Models* and `urm releases` list the releases and the reasons.
"""

import sys
from pathlib import Path
from typing import Any

from airflow.sdk import Context, Param, dag

sys.path.append(str(Path(__file__).parents[1]))  # Airflow adds a bundle's root, which may be this folder

from components.flow import STAGES
from dags.common.params import CONFIG
from dags.common.tasks import command_task

PARAMS = {
    "why": Param(
        type="string", minLength=3, title="Why", description="The reason, for those who look at the releases later."
    ),
    "to": Param(
        None,
        type=["string", "null"],  # the form sends null for an empty field
        title="To which release",
        description="Its name, e.g. urm-3f1c0a9b2d4e; empty: the one that served before.",
    ),
    "config": CONFIG,
}


def rollback_arguments(context: Context, jinja_env: Any = None) -> list[str]:
    """Arguments of `urm`, from the params of the DAG run."""
    params = context["params"]
    to = [f"--to={params['to']}"] if params["to"] else []
    return ["rollback", f"--config={params['config']}", f"--why={params['why']}", *to]


@dag(
    dag_id="recall_rollback",
    dag_display_name="recall_rollback",
    description="An earlier release serves again.",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    max_active_runs=1,
    params=PARAMS,
    tags=["urm", "serving"],
)
def recall_rollback() -> None:
    """The graph: one command."""
    promote = STAGES["promote"]
    command_task(
        "rollback",
        rollback_arguments,
        doc="Rolls the release out, checks what serves, and makes it the champion; else undoes it. Not tried again: "
        "without a named release, a second try would go back to where the first came from.",
        resources=promote.resources,
        access=promote.access,
        credentials=promote.credentials,
    )


recall_rollback()
