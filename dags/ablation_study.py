"""What each part of URM is worth: variants of one configuration, trained alike, compared on the validation split.

1. **plan_…**: read the grid (`configs/ablations/<grid>.yaml`): a name and a few overrides per variant, and the seeds.
2. **reference**: the configuration itself, once per seed; leaves data, features and item vectors for all variants.
3. **variant**: one task per variant and seed: the stages up to `sft`, then recall on all validation examples.
4. **summary**: table, report and figures with paired bootstrap intervals over users, in MLflow and the run directory.

The test weeks are never read. What an equal earlier run has finished is reused, so that clearing failed tasks, or
another run of the same grid, goes on where the last one stopped.
"""

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import Param, XComArg, chain, dag, task

sys.path.append(str(Path(__file__).parents[1]))  # Airflow adds a bundle's root, which may be this folder

from components.flow import STAGES
from dags.common.params import CONFIG, OVERRIDES
from dags.common.tasks import OWNER, command_tasks

PARAMS = {
    "grid": Param(
        "urm",
        type="string",
        pattern=r"^[a-z][a-z0-9_]*$",
        title="Grid",
        description="Name of a file in configs/ablations, without .yaml.",
    ),
    "config": CONFIG,
    "overrides": OVERRIDES,
}


def plan_commands(params: dict[str, Any], run_id: str) -> dict[str, list[list[str]]]:
    """Arguments of every `urm` command of the study; the run's id names the run directories.

    Raises:
        ConfigError: There is no such grid, or it has a mistake.
    """
    from components.settings import get_settings
    from components.studies.ablation.grid import REFERENCE, load_grid

    settings = get_settings()
    grid = load_grid(params["grid"], settings.configs_dir)
    options = ["--grid", params["grid"], "--config", params["config"], "--run-dir", settings.run_dir(run_id)]
    for override in params["overrides"] or []:
        options += ["--set", override]

    def run(variant: str, seed: int) -> list[str]:
        return ["ablation", "run", "--variant", variant, "--seed", str(seed), *options]

    others = [variant for variant in grid.variants if variant != REFERENCE]
    return {
        "reference": [run(REFERENCE, seed) for seed in grid.seeds],
        "variant": [run(variant, seed) for variant in others for seed in grid.seeds],
        "summary": [["ablation", "summary", *options]],
    }


@dag(
    dag_id="ablation_study",
    dag_display_name="ablation_study",
    description="Variants of URM from a grid, trained alike and compared on validation.",
    doc_md=__doc__,
    schedule=None,
    catchup=False,
    max_active_runs=1,
    params=PARAMS,
    tags=["urm", "research"],
)
def ablation_study() -> None:
    """The graph; what a command does stands in `components/studies/ablation`."""

    def commands(part: str) -> XComArg:
        @task(task_id=f"plan_{part}", owner=OWNER, execution_timeout=timedelta(minutes=5), doc_md=plan_commands.__doc__)
        def plan(params: dict[str, Any], run_id: str) -> list[list[str]]:
            return plan_commands(params, run_id)[part]

        planned: XComArg = plan()  # type: ignore[call-arg,misc]  # Airflow fills in params and run_id from the context
        return planned

    reference = command_tasks(
        "reference",
        commands("reference"),
        doc="The configuration itself, once per seed: all stages up to `sft`, then recall on the validation examples.",
        resources=replace(STAGES["sft"].resources, hours=24),
        access="training",
    )
    variant = command_tasks(
        "variant",
        commands("variant"),
        doc="One variant with one seed. Shared stages are reused; a retry on the same disk resumes training from its "
        "last checkpoint.",
        resources=replace(STAGES["sft"].resources, hours=14),
        access="training",
    )
    summary = command_tasks(
        "summary",
        commands("summary"),
        doc="Table, report and figures of the study, with intervals, in MLflow and in the run directory.",
        resources=replace(STAGES["evaluate"].resources, hours=1),
        access="training",
    )
    chain(reference, variant, summary)


ablation_study()
