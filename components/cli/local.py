"""`urm up`, `urm down`, `urm status`: the services of one machine; `urm demo`: the whole chain on them."""

import re
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.cli.options import DEFAULT_CONFIG, ConfigOption, ForceOption, SetOption, make_console, read_config
from components.config import NAME
from components.exceptions import ConfigError
from components.local.airflow import USERNAME, read_credentials
from components.local.processes import find, memory_bytes
from components.local.registry import Registry
from components.settings import get_settings

app = typer.Typer(no_args_is_help=True)
_PANEL = "On this machine"


@app.command(rich_help_panel=_PANEL)
def up(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Start Airflow, MLflow, Redis and the recall runtime on free loopback ports; state in ./.urm.

    Recall worker and API take their section `recall` from the configuration; with another one they start anew.
    """
    from components.local.stack import up as bring_up

    settings, console = get_settings(), make_console(soft_wrap=True)
    read_config(config, None)  # a mistake shows before anything starts
    start = time.monotonic()
    bring_up(settings, lambda text: console.print(f"[dim]{time.monotonic() - start:5.1f} s[/]  {text}"), config)
    _print_status(console)


@app.command(rich_help_panel=_PANEL)
def down() -> None:
    """Stop everything that `urm up` started; the state stays."""
    from components.local.stack import down as take_down

    console = make_console(soft_wrap=True)
    take_down(get_settings(), console.print)
    console.print("all services are stopped")


@app.command(rich_help_panel=_PANEL)
def status() -> None:
    """Print what runs, where, and how much memory it takes."""
    _print_status(make_console(soft_wrap=True))


@app.command(rich_help_panel=_PANEL)
def demo(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    promote_anyway: Annotated[
        bool,
        typer.Option(
            "--promote-anyway", help="Release and promote even if the gate fails, to show the rest of the chain."
        ),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Run the whole chain through Airflow, show the comparison, and make one live round trip."""
    from components.local.demo import run_demo

    settings = get_settings()
    overrides = set_ or []
    run_config = read_config(config, overrides)  # a mistake shows before anything starts
    if not re.match(NAME, config):
        raise ConfigError(
            "--config",
            expected="the name of a file in configs/, of a-z, 0-9 and _, since Airflow starts the run by it",
            got=repr(config),
            remedy="put the file there, or run the stages by hand",
        )
    conf = {"config": config, "overrides": overrides, "promote_anyway": promote_anyway, "force": force}
    run_demo(settings, make_console(soft_wrap=True), conf, run_config)


def _print_status(console: Console) -> None:
    settings = get_settings()
    home = settings.home.absolute()
    records = Registry(home).read()
    if not records:
        console.print("nothing is up; start the services with [bold]urm up[/]")
        return
    table = Table("service", "state", "pid", "address", "memory")
    total = 0
    for name, record in records.items():
        alive = find(record.process) is not None
        memory = memory_bytes(record.process) if alive else 0
        total += memory
        state = "[green]up[/]" if alive else "[red]down[/]"
        table.add_row(name, state, str(record.process.pid), record.url, f"{memory / 2**20:,.0f} MiB")
    console.print(table)
    console.print(f"{total / 2**30:.1f} GiB together; logs in {home / 'logs'}")
    if "airflow-api" in records:
        password = read_credentials(home / "airflow")["password"]
        console.print(f"Airflow: {records['airflow-api'].url}  user {USERNAME}  password {password}")
