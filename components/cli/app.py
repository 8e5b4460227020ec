"""The `urm` command: one sub-command per stage, the recall runtime, and the local services.

Exit codes: 0 success, 1 an error of this software, 2 a mistake in the input, 3 a service that does not answer,
143 ended by SIGTERM, a training after a checkpoint.
"""

import logging
import signal
import sys
from typing import Annotated

import structlog
import typer
import yaml
from rich.console import Console
from rich.markup import escape

from components import __version__
from components.cli.data import app as data_app
from components.cli.local import app as local_app
from components.cli.options import DEFAULT_CONFIG, ConfigOption, SetOption, read_config
from components.cli.recall import app as recall_app
from components.cli.releases import app as releases_app
from components.cli.releases import rollback
from components.cli.stages import app as stages_app
from components.cli.studies import ablation_app
from components.cli.studies import app as studies_app
from components.exceptions import ConfigError, UrmError

app = typer.Typer(
    name="urm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LLM recall for e-commerce: from behaviour logs to an asynchronous recall service.",
)


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


app.registered_commands += stages_app.registered_commands


@app.command(rich_help_panel="Look")
def show(config: ConfigOption = DEFAULT_CONFIG, set_: SetOption = None) -> None:
    """Print the resolved configuration."""
    typer.echo(yaml.safe_dump(read_config(config, set_).model_dump(mode="json"), sort_keys=False))


app.add_typer(data_app, name="data", rich_help_panel="On this machine")
app.add_typer(recall_app, name="recall", rich_help_panel="Serve")
app.add_typer(releases_app, name="releases", rich_help_panel="Serve")
app.command(rich_help_panel="Serve")(rollback)
app.add_typer(ablation_app, name="ablation", rich_help_panel="Look")
for other in (studies_app, local_app):
    app.registered_commands += other.registered_commands


def end_on_sigterm() -> None:
    """Unwind on SIGTERM instead of dying at once, so that an open MLflow run is closed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def run_app() -> None:
    """Entry point of the console script: errors on purpose become one sentence and an exit code."""
    end_on_sigterm()
    try:
        _run()
    except UrmError as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error[/] {escape(str(error))}", highlight=False)
        raise SystemExit(error.exit_code) from error


def _run() -> None:
    try:
        app()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("components"):
            raise
        raise ConfigError(
            "this command",
            expected=f"the Python module {error.name}",
            got="none",
            remedy="install the extra that this machine needs, such as `pip install 'urm-recall[all]'`",
        ) from error
