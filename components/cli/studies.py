"""Studies of runs: `urm compare`, `urm trust`, `urm explain`, `urm steering`, `urm ablation …`."""

from pathlib import Path
from typing import Annotated

import typer

from components.cli.options import (
    DEFAULT_CONFIG,
    ConfigOption,
    ForceOption,
    RunDirOption,
    SetOption,
    make_console,
    read_config,
)
from components.cli.stages import run_spec
from components.flow import STUDIES
from components.settings import get_settings

app = typer.Typer(no_args_is_help=True)
ablation_app = typer.Typer(
    no_args_is_help=True, help="Ablation studies: variants of a configuration, compared on validation."
)
_PANEL = "Look"

GridOption = Annotated[str, typer.Option("--grid", "-g", help="Name of a grid in configs/ablations, or a file.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="One seed; all of the grid if empty.")]
StudyDirOption = Annotated[
    str, typer.Option("--run-dir", "-r", help="Run directory of the study; those of its variants lie beside it.")
]


@app.command(rich_help_panel=_PANEL)
def compare(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="Evaluated runs: seeds, data sets.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Markdown file to write; else print.")] = None,
    draws: Annotated[int, typer.Option(min=100, help="Bootstrap draws.")] = 2000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
) -> None:
    """Several runs as one table: mean and deviation over seeds, intervals pooled over seeds; also in MLflow."""
    from components.studies.comparison import compare_runs

    settings = get_settings()
    paths = [settings.find_run_dir(run_dir) for run_dir in run_dirs]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    text = compare_runs(paths, settings=settings, draws=draws, confidence=confidence)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text)


@app.command(rich_help_panel=_PANEL)
def trust(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="Evaluated runs: seeds, data sets.")],
) -> None:
    """What the gate's rule is worth on these runs: false alarms, power, chance of training; nothing is trained."""
    from components.studies.trust import describe, study_runs

    settings, console = get_settings(), make_console()
    for part in describe(study_runs([settings.find_run_dir(run_dir) for run_dir in run_dirs], settings)):
        console.print(part)


@app.command(rich_help_panel=_PANEL)
def explain(
    user: Annotated[str, typer.Argument(help="User id.")],
    config: ConfigOption = DEFAULT_CONFIG,
    run_dir: RunDirOption = "default",
    task: Annotated[str | None, typer.Option("--task", "-t", help="Task; the first without a query if empty.")] = None,
    query: Annotated[str | None, typer.Option("--query", "-q", help="Words searched for, for query tasks.")] = None,
    guidance: Annotated[str | None, typer.Option("--guidance", "-g", help='Free text, e.g. "For a barbecue."')] = None,
    k: Annotated[int, typer.Option(min=1, help="Items of the recall shown.")] = 10,
    set_: SetOption = None,
) -> None:
    """Print a user's history, what the model says of it, and what each user vector stands for."""
    from components.studies.explain import explain_user, pick_task
    from components.studies.finished import FinishedRun

    run_config = read_config(config, set_)
    settings = get_settings()
    run = FinishedRun(settings.find_run_dir(run_dir), settings)
    chosen = pick_task(run_config, task)
    make_console().print(explain_user(run, run_config, user, chosen, query=query, guidance=guidance, k=k))


@app.command(rich_help_panel=_PANEL)
def steering(
    config: ConfigOption = DEFAULT_CONFIG,
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Measure how far guidance phrases move the recall, by configs/guidance/<name of the configuration>.yaml."""
    from components.studies.steering import options, table

    run_config = read_config(config, set_)
    result = run_spec(STUDIES["steering"], config, run_dir, set_, force, options=options(get_settings(), run_config))
    make_console().print(table(result.metrics))


@ablation_app.command()
def run(
    grid: GridOption = "urm",
    config: ConfigOption = DEFAULT_CONFIG,
    run_dir: StudyDirOption = "ablation",
    variant: Annotated[str | None, typer.Option("--variant", help="One variant; all if empty.")] = None,
    seed: SeedOption = None,
    set_: SetOption = None,
) -> None:
    """Train and measure variants; what is finished is not done again."""
    from components.studies.ablation.grid import load_grid
    from components.studies.ablation.study import run_variant

    study = load_grid(grid, get_settings().configs_dir).of_seed(seed)
    variants = [variant] if variant is not None else list(study.variants)
    for name in variants:
        for number in study.seeds:
            done = run_variant(
                study, name, number, config=config, study_dir=get_settings().find_run_dir(run_dir), overrides=set_ or []
            )
            typer.echo(f"{name} with seed {number}: {done}")


@ablation_app.command()
def measure(config: ConfigOption = DEFAULT_CONFIG, run_dir: RunDirOption = "default", set_: SetOption = None) -> None:
    """Recall of a finished run on all validation examples."""
    result = run_spec(STUDIES["measure"], config, run_dir, set_)
    typer.echo(f"validation recall {result.metrics['mean_recall']:.4f}")


@ablation_app.command()
def summary(
    grid: GridOption = "urm",
    config: ConfigOption = DEFAULT_CONFIG,
    run_dir: StudyDirOption = "ablation",
    seed: SeedOption = None,
    set_: SetOption = None,
) -> None:
    """Write the table, the report and the figures of a finished study, and log them to MLflow."""
    from components.studies.ablation.grid import digest_settings, load_grid, write_settings
    from components.studies.ablation.summary import summarise

    study = load_grid(grid, get_settings().configs_dir).of_seed(seed)
    given = set_ or []
    digests = {
        name: digest_settings(read_config(config, [*given, *study.settings_of(name, seed=0)]))
        for name in study.variants
    }
    overrides = [*given, *write_settings(study.overrides)]
    result = run_spec(
        STUDIES["ablation_summary"], config, run_dir, overrides, function=lambda stage: summarise(stage, study, digests)
    )
    typer.echo(result.outputs["report"])
