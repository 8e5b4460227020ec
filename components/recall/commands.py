"""`urm recall …`: the worker, the API, and what an operator needs beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from components.config import RunConfig, load_named_config
from components.exceptions import UnavailableError
from components.recall.logs import log_as_json
from components.release.redis_client import open_redis, redis_errors
from components.settings import get_settings

app = typer.Typer(no_args_is_help=True, help="The asynchronous recall runtime.")
letters_app = typer.Typer(no_args_is_help=True, help="Events that were given up, each with its reason.")
app.add_typer(letters_app, name="dead-letters")

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="Run configuration: a YAML file, or the name of one in configs/.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one value, e.g. --set recall.batch_size=8."),
]
HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
LetterIds = Annotated[list[str] | None, typer.Argument(help="Ids as `list` shows them.", show_default=False)]
AllOption = Annotated[bool, typer.Option("--all", help="Every dead letter.")]
_LOOPBACK = "127.0.0.1"


@app.command(rich_help_panel="Run")
def worker(
    config: ConfigOption = "complete_journey",
    set_: SetOption = None,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics; 0: none.")] = 0,
    host: HostOption = _LOOPBACK,
) -> None:
    """Consume events and store results until SIGTERM; waits while there is no release."""
    from components.recall.launch import run_worker

    log_as_json()
    run_worker(get_settings(), _read(config, set_), host, metrics_port)


@app.command(rich_help_panel="Run")
def serve(
    config: ConfigOption = "complete_journey",
    set_: SetOption = None,
    host: HostOption = _LOOPBACK,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve the recall API; its documentation is at /docs."""
    import uvicorn

    from components.recall.api import create_app

    log_as_json()
    settings = get_settings()
    application = create_app(settings, _read(config, set_).recall)
    try:
        uvicorn.run(application, host=host, port=port, access_log=False)
    except SystemExit as error:
        raise UnavailableError(
            f"recall API on {host}:{port}", expected="a free port", got="an error, see above", remedy="choose another"
        ) from error


@app.command(rich_help_panel="Operate")
def events(
    file: Annotated[Path, typer.Argument(help="Parquet, CSV or JSONL with the fields of an event.")],
    config: ConfigOption = "complete_journey",
    set_: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Feed only the first N.")] = None,
) -> None:
    """Feed events of a file into the stream, in order; feeding a file again is harmless for a day."""
    from components.recall.intake import feed, read_events

    recall, settings = _read(config, set_).recall, get_settings()
    with redis_errors(settings.redis_url):
        report = feed(open_redis(settings.redis_url), read_events(file, recall.max_future_seconds, limit=limit), recall)
    typer.echo(f"{report.accepted} accepted, {report.duplicates} accepted before")


@app.command(rich_help_panel="Operate")
def show(
    user: Annotated[str, typer.Argument(help="User id.")],
    task: Annotated[str, typer.Option(help="Task of the serving release.")] = "next_purchase",
    k: Annotated[int, typer.Option(min=1, help="Number of items.")] = 20,
    config: ConfigOption = "complete_journey",
) -> None:
    """Print a user's stored recall beside the live events it knows."""
    from components.recall.show import describe_user

    settings = get_settings()
    with redis_errors(settings.redis_url):
        Console().print(describe_user(settings, _read(config, None).recall, user, task, k))


@app.command(rich_help_panel="Operate")
def rollback(config: ConfigOption = "complete_journey", set_: SetOption = None) -> None:
    """Promote the release with the alias `previous`; the champion becomes `previous`."""
    from components.release.promote import rollback as roll_back

    deployment = roll_back(get_settings(), _read(config, set_).release)
    typer.echo(f"serving {deployment['release']} (version {deployment['version']}) in {deployment['seconds']} s")


@letters_app.command("list")
def list_letters(limit: Annotated[int, typer.Option(min=1, help="At most so many, oldest first.")] = 100) -> None:
    """Print dead letters with their reasons."""
    from components.recall.deadletters import list_letters as read_letters

    client, url = _connect()
    with redis_errors(url):
        letters = read_letters(client, limit)
    table = Table("id", "given up at", "tries", "reason", "event")
    for letter in letters:
        at = letter.at.isoformat(timespec="seconds")
        table.add_row(letter.letter_id, at, str(letter.deliveries), letter.reason, letter.event)
    Console().print(table if letters else "no dead letters")


@letters_app.command("replay")
def replay_letters(letter_ids: LetterIds = None, every: AllOption = False) -> None:
    """Put dead letters back into the event stream, once their cause is mended."""
    from components.recall.deadletters import replay

    _require_choice(letter_ids, every)
    client, url = _connect()
    with redis_errors(url):
        typer.echo(f"{replay(client, letter_ids or [])} replayed")


@letters_app.command("drop")
def drop_letters(letter_ids: LetterIds = None, every: AllOption = False) -> None:
    """Delete dead letters for good."""
    from components.recall.deadletters import drop

    _require_choice(letter_ids, every)
    client, url = _connect()
    with redis_errors(url):
        typer.echo(f"{drop(client, letter_ids or [])} dropped")


def _require_choice(letter_ids: list[str] | None, every: bool) -> None:
    if bool(letter_ids) == every:
        raise typer.BadParameter("expected ids or --all, got both or neither; see `urm recall dead-letters list`")


def _connect() -> tuple[Any, str]:
    url = get_settings().redis_url
    return open_redis(url), url


def _read(config: str, overrides: list[str] | None) -> RunConfig:
    return load_named_config(config, get_settings().configs_dir, overrides or [])
