"""Parameters that every DAG takes, and the command line and environment that a stage gets from them.

The functions are values of template fields: Airflow calls them when a task starts, and shows what they return in the
tab *Rendered Templates*.
"""

from typing import Any

from airflow.sdk import Asset, Context, Param

from components.flow import STAGES
from components.settings import get_settings, setting_variables

CONFIG = Param(
    "complete_journey",
    type="string",
    pattern=r"^[a-z][a-z0-9_]*$",
    examples=["complete_journey", "amazon_beauty", "marketplace", "production"],
    title="Configuration",
    description="Name of a file in configs/, without .yaml.",
)
OVERRIDES = Param(
    [],
    type=["array", "null"],  # the form sends null for an empty field
    items={"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_.]*=.*$"},
    title="Overrides",
    description="Values that differ from the configuration, one KEY=VALUE per line, e.g. urm.max_steps=50.",
)
FORCE = Param(
    False, type="boolean", title="Force", description="Compute every stage again, even where an equal result exists."
)

# What promotions update, and the back-fill runs after; its events name the configuration of the promotion.
SERVING_RELEASE = Asset("serving_release")


def announce_release(context: Context, result: Any = None) -> None:
    """Note on the asset with which configuration this run has promoted."""
    context["outlet_events"][SERVING_RELEASE].extra["config"] = context["params"]["config"]


def stage_arguments(stage: str, context: Context, jinja_env: Any = None) -> list[str]:
    """Arguments of `urm` for a stage, from the params of its DAG run."""
    params = context["params"]
    arguments = [stage, "--config", params["config"], "--run-dir", get_settings().run_dir(context["run_id"])]
    for override in params["overrides"] or []:
        arguments += ["--set", override]
    if params["force"]:
        arguments.append("--force")
    return arguments + [f"--{flag.replace('_', '-')}" for flag in STAGES[stage].flags if params[flag]]


def engine_variables(stage: str = "") -> dict[str, str]:
    """The engine of a stage, as the environment of Airflow says; what Spark cannot do, DuckDB does."""
    settings = get_settings()
    if settings.engine == "duckdb":
        return {}
    if not (stage and STAGES[stage].spark):
        return {"URM_ENGINE": "duckdb"}
    named = {"URM_ENGINE": settings.engine, "URM_SPARK_MASTER": settings.spark_master}
    return named | ({"URM_ENGINE_MEMORY": settings.engine_memory} if settings.engine_memory else {})


def link_variables(context: Context, jinja_env: Any = None) -> dict[str, str]:
    """Settings that lead from the traces of a command back to this DAG run."""
    return {
        "URM_AIRFLOW_DAG_ID": context["dag"].dag_id,
        "URM_AIRFLOW_RUN_ID": context["run_id"],
        "URM_AIRFLOW_URL": get_settings().airflow_url,
    }


def process_variables(context: Context, jinja_env: Any = None, *, stage: str = "") -> dict[str, str]:
    """Settings of a command that runs on this machine; none of them holds credentials."""
    return setting_variables() | link_variables(context) | engine_variables(stage)
