"""`urm explain`, `urm language`, `urm steering`: what a trained model can do with words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from components.config import RunConfig, load_named_config
from components.flow import StageSpec
from components.settings import get_settings
from components.storage import StageReport, StageResult, StageRun, run_stage

app = typer.Typer(no_args_is_help=True)
_PANEL = "Look"
PIPE_WIDTH = 140  # columns, where the output goes to a file or a pipe

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="Run configuration: a YAML file, or a name.")]
RunDirOption = Annotated[str, typer.Option("--run-dir", "-r", help="Folder or URI of a run with stage sft done.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one value, as in the run.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Compute again even if an equal result exists.")]


@app.command(rich_help_panel=_PANEL)
def explain(
    user: Annotated[str, typer.Argument(help="User id.")],
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    task: Annotated[str | None, typer.Option("--task", "-t", help="Task; the first without a query if empty.")] = None,
    query: Annotated[str | None, typer.Option("--query", "-q", help="Words searched for, for query tasks.")] = None,
    guidance: Annotated[str | None, typer.Option("--guidance", "-g", help='Free text, e.g. "For a barbecue."')] = None,
    k: Annotated[int, typer.Option(min=1, help="Items of the recall shown.")] = 10,
    set_: SetOption = None,
) -> None:
    """Print a user's history, what the model says of it, and what each user vector stands for."""
    from components.abilities.explain import explain_user, pick_task
    from components.abilities.finished import FinishedRun

    run_config = _read(config, set_)
    settings = get_settings()
    run = FinishedRun(settings.find_run_dir(run_dir), settings)
    chosen = pick_task(run_config, task)
    _console().print(explain_user(run, run_config, user, chosen, query=query, guidance=guidance, k=k))


@app.command(rich_help_panel=_PANEL)
def language(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Measure plain English, zero-shot questions and the [LM] text, before and after SFT."""
    from components.abilities.language import LANGUAGE, options, run, table

    run_config = _read(config, set_)
    result = _measure(LANGUAGE, run, run_config, run_dir, options(get_settings()), force)
    _console().print(table(result.metrics))


@app.command(rich_help_panel=_PANEL)
def steering(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Measure how far guidance phrases move the recall, by configs/guidance/<name of the configuration>.yaml."""
    from components.abilities.steering import STEERING, options, run, table

    run_config = _read(config, set_)
    result = _measure(STEERING, run, run_config, run_dir, options(get_settings(), run_config), force)
    _console().print(table(result.metrics))


def _measure(
    study: StageSpec,
    run: Callable[[StageRun], StageReport],
    config: RunConfig,
    run_dir: str,
    options: dict[str, Any],
    force: bool,
) -> StageResult:
    settings = get_settings()
    return run_stage(
        study,
        run,
        config=config,
        run_dir=settings.find_run_dir(run_dir),
        settings=settings,
        options=options,
        force=force,
    )


def _read(config: str, overrides: list[str] | None) -> RunConfig:
    return load_named_config(config, get_settings().configs_dir, overrides or [])


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)
