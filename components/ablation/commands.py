"""`urm ablation`: the variants of a grid, trained alike and compared on validation."""

from __future__ import annotations

from typing import Annotated

import typer

from components.config import RunConfig, load_named_config
from components.settings import get_settings
from components.storage import run_stage

app = typer.Typer(no_args_is_help=True, help="Ablation studies: variants of a configuration, compared on validation.")

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="Configuration: a YAML file, or a name.")]
GridOption = Annotated[str, typer.Option("--grid", "-g", help="Name of a grid in configs/ablations, or a file.")]
RunDirOption = Annotated[
    str, typer.Option("--run-dir", "-r", help="Run directory of the study; those of its variants lie beside it.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one value in all variants.")
]


@app.command()
def run(
    grid: GridOption = "urm",
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "ablation",
    variant: Annotated[str | None, typer.Option("--variant", help="One variant; all if empty.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="One seed; all of the grid if empty.")] = None,
    set_: SetOption = None,
) -> None:
    """Train and measure variants; what is finished is not done again."""
    from components.ablation.grid import load_grid
    from components.ablation.study import run_variant

    study = load_grid(grid, get_settings().configs_dir)
    variants = [variant] if variant is not None else list(study.variants)
    seeds = study.seeds if seed is None else (seed,)
    for name in variants:
        for number in seeds:
            done = run_variant(
                study, name, number, config=config, study_dir=get_settings().find_run_dir(run_dir), overrides=set_ or []
            )
            typer.echo(f"{name} with seed {number}: {done}")


@app.command()
def measure(
    config: ConfigOption = "complete_journey", run_dir: RunDirOption = "default", set_: SetOption = None
) -> None:
    """Recall of a finished run on all validation examples."""
    from components.ablation.measure import MEASURE
    from components.ablation.measure import run as function

    result = run_stage(
        MEASURE,
        function,
        config=_read(config, set_),
        run_dir=get_settings().find_run_dir(run_dir),
        settings=get_settings(),
    )
    typer.echo(f"validation recall {result.metrics['mean_recall']:.4f}")


@app.command()
def summary(
    grid: GridOption = "urm",
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "ablation",
    set_: SetOption = None,
) -> None:
    """Write the table, the report and the figures of a finished study, and log them to MLflow."""
    from components.ablation.grid import load_grid
    from components.ablation.summary import SUMMARY, summarise

    settings = get_settings()
    study = load_grid(grid, settings.configs_dir)
    overrides = [*(set_ or []), *(f"{key}={value}" for key, value in study.overrides.items())]
    result = run_stage(
        SUMMARY,
        lambda stage: summarise(stage, study),
        config=_read(config, overrides),
        run_dir=settings.find_run_dir(run_dir),
        settings=settings,
    )
    typer.echo(result.outputs["report"])


def _read(config: str, overrides: list[str] | None) -> RunConfig:
    return load_named_config(config, get_settings().configs_dir, overrides or [])
