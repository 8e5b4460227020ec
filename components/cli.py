"""The `urm` command: one sub-command a stage, the recall runtime, and the local services.

Exit codes: 0 success, 1 an error of this software, 2 a mistake in the input, 3 a service that does not answer.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import yaml
from rich.console import Console
from rich.markup import escape

from components import __version__
from components.abilities.commands import app as abilities_app
from components.ablation.commands import app as ablation_app
from components.config import RunConfig, load_named_config
from components.exceptions import UrmError
from components.local.commands import app as local_app
from components.memory import keep_freed_memory
from components.recall.commands import app as recall_app
from components.settings import get_settings
from components.storage import StageReport, StageResult, StageRun, run_stage

app = typer.Typer(
    name="urm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LLM recall for e-commerce: from behaviour logs to an asynchronous recall service.",
)

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="Run configuration: a YAML file, or the name of one in configs/.")
]
RunDirOption = Annotated[
    str,
    typer.Option("--run-dir", "-r", help="Folder or URI (s3://…) of this run; a new name under the runs root if bare."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one value, e.g. --set urm.max_steps=50."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Compute again even if an equal result exists.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Configure logging before any sub-command."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


@app.command(rich_help_panel="Stages, in order")
def ingest(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
    check: Annotated[bool, typer.Option("--check", help="Only report what is wrong with the source.")] = False,
) -> None:
    """Raw logs → the canonical tables events and items."""
    if check:
        from components.ingestion.check import check_source

        report = check_source(_read_config(config, set_).source)
        typer.echo(report.text)
        raise typer.Exit(0 if report.passed else 2)
    from components.ingestion.files import fingerprint_files

    options = {"source_files": fingerprint_files(_read_config(config, set_).source)}
    _run("ingest", "components.ingestion.stage", config, run_dir, set_, force, options)


@app.command(rich_help_panel="Stages, in order")
def validate(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Great Expectations suites over both tables; bad rows go to the quarantine with a reason."""
    from components.validation.freshness import NEWEST_EVENT, require_fresh

    result = _run("validate", "components.validation.stage", config, run_dir, set_, force)
    require_fresh(result.metrics[NEWEST_EVENT], _read_config(config, set_).validation, datetime.now(UTC))


@app.command(rich_help_panel="Stages, in order")
def features(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Behaviour sequences in Feast, and task examples by point-in-time retrieval."""
    _run("features", "components.features.stage", config, run_dir, set_, force)


@app.command(rich_help_panel="Stages, in order")
def encode(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Frozen text and image vectors of every item, as a memory-mapped item table."""
    _run("encode", "components.items.stage", config, run_dir, set_, force)


@app.command(rich_help_panel="Stages, in order")
def baseline(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Popularity, own history, item-kNN and the target-attention network, with their test predictions."""
    _run("baseline", "components.baseline.stage", config, run_dir, set_, force)


@app.command(rich_help_panel="Stages, in order")
def sft(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Full-parameter SFT of the universal recommendation model; resumes from its last checkpoint."""
    _run("sft", "components.urm.stage", config, run_dir, set_, force)


@app.command(rich_help_panel="Stages, in order")
def evaluate(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Recall per task on the full catalogue, each with a paired bootstrap interval."""
    _run("evaluate", "components.evaluation.evaluate", config, run_dir, set_, force)


@app.command(rich_help_panel="Stages, in order")
def gate(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Pass or fail by the policy in the configuration, with reasons."""
    result = _run("gate", "components.evaluation.gate", config, run_dir, set_, force)
    typer.echo(result.metrics["verdict"])


@app.command(rich_help_panel="Stages, in order")
def release(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
    promote_anyway: Annotated[
        bool, typer.Option("--promote-anyway", help="Build the release although the gate failed; tagged as such.")
    ] = False,
) -> None:
    """Bundle model, item table, index and tasks under one manifest; register it in MLflow as candidate."""
    options = {"promote_anyway": promote_anyway}
    _run("release", "components.release.stage", config, run_dir, set_, force, options)


@app.command(rich_help_panel="Stages, in order")
def promote(
    config: ConfigOption = "complete_journey",
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """Load the release beside the serving one, smoke-check it, flip; roll back on failure."""
    _run("promote", "components.release.promote", config, run_dir, set_, force)


@app.command(rich_help_panel="Look")
def compare(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN_DIR...", help="Evaluated runs: seeds, data sets.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Markdown file to write; else print.")] = None,
    draws: Annotated[int, typer.Option(min=100, help="Bootstrap draws.")] = 2000,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
) -> None:
    """Several runs as one table: mean and deviation over seeds, intervals pooled over seeds; also in MLflow."""
    from components.evaluation.comparison import compare_runs

    settings = get_settings()
    paths = [settings.find_run_dir(run_dir) for run_dir in run_dirs]
    text = compare_runs(paths, settings=settings, draws=draws, confidence=confidence)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text)


@app.command(rich_help_panel="Look")
def show(
    config: ConfigOption = "complete_journey",
    set_: SetOption = None,
) -> None:
    """Print the resolved configuration."""
    typer.echo(yaml.safe_dump(_read_config(config, set_).model_dump(mode="json"), sort_keys=False))


app.add_typer(recall_app, name="recall", rich_help_panel="Serve")
app.add_typer(ablation_app, name="ablation", rich_help_panel="Look")
app.registered_commands += abilities_app.registered_commands
app.registered_commands += local_app.registered_commands


def _read_config(name: str, overrides: list[str] | None) -> RunConfig:
    return load_named_config(name, get_settings().configs_dir, overrides or [])


def _run(
    stage: str,
    module: str,
    config: str,
    run_dir: str,
    overrides: list[str] | None,
    force: bool,
    options: dict[str, Any] | None = None,
) -> StageResult:
    keep_freed_memory()
    settings = get_settings()
    run_config = _read_config(config, overrides)
    run_dir = settings.find_run_dir(run_dir)

    def function(stage_run: StageRun) -> StageReport:
        # Only now, since it may take seconds: a reused result or a missing input needs none of it.
        report: StageReport = importlib.import_module(module).run(stage_run)
        return report

    return run_stage(
        stage, function, config=run_config, run_dir=run_dir, settings=settings, options=options, force=force
    )


def end_on_sigterm() -> None:
    """Unwind on SIGTERM instead of dying at once, so that an open MLflow run is closed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def run_app() -> None:
    """Entry point of the console script: errors on purpose become one sentence and an exit code."""
    end_on_sigterm()
    try:
        app()
    except UrmError as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/] {escape(str(error))}", highlight=False)
        sys.exit(error.exit_code)
