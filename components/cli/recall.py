"""`urm recall …`: the worker, the API, and what an operator needs beside them."""

import signal
import sys
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.cli.options import DEFAULT_CONFIG, ConfigOption, SetOption, make_console, read_config
from components.exceptions import ConfigError, UnavailableError
from components.memory import collect_rarely
from components.recall.telemetry.logs import log_as_json
from components.settings import get_settings

if TYPE_CHECKING:
    import redis

app = typer.Typer(no_args_is_help=True, help="The asynchronous recall runtime.")
letters_app = typer.Typer(no_args_is_help=True, help="Events that were given up, each with its reason.")
app.add_typer(letters_app, name="dead-letters")
token_app = typer.Typer(no_args_is_help=True, help="Who may use the recall API (URM_API_TOKENS_FILE).")
app.add_typer(token_app, name="token")

HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
LetterIds = Annotated[list[str] | None, typer.Argument(help="Ids as `list` shows them.", show_default=False)]
AllOption = Annotated[bool, typer.Option("--all", help="Every dead letter.")]
_LOOPBACK = "127.0.0.1"


@app.command(rich_help_panel="Run")
def worker(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics; 0: none.")] = 0,
    host: HostOption = _LOOPBACK,
    ad_hoc: Annotated[bool, typer.Option("--ad-hoc", help="Answer POST /v1/recall instead.")] = False,
) -> None:
    """Consume events and store results until SIGTERM; waits while there is no release."""
    from components.recall.process.launch import run_worker

    run_config = read_config(config, set_)
    log_as_json()
    run_worker(get_settings(), run_config, host, metrics_port, ad_hoc)


@app.command(rich_help_panel="Run")
def workers(
    instances: Annotated[int, typer.Option("--instances", "-n", min=0, help="Worker processes.")] = 2,
    ad_hoc: Annotated[int, typer.Option(min=0, help="Further processes that answer POST /v1/recall.")] = 0,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    host: HostOption = _LOOPBACK,
    port: Annotated[int, typer.Option(help="Port of /healthz, /readyz and /metrics; instance i adds 1 + i.")] = 9100,
    stuck_seconds: Annotated[float, typer.Option(min=1, help="Longest silence of an instance.")] = 60,
) -> None:
    """Run several workers in this container, each with URM_NUM_THREADS threads, until SIGTERM."""
    from components.recall.process.launch import run_instances

    if not instances + ad_hoc:
        raise typer.BadParameter("expected a process to run, got --instances 0 without --ad-hoc")
    read_config(config, set_)  # a mistake is reported once, here, and not by every instance
    log_as_json()
    arguments = ["--config", config, *(part for value in set_ or [] for part in ("--set", value))]
    run_instances(get_settings(), arguments, instances, ad_hoc, host, port, stuck_seconds)


@app.command(rich_help_panel="Run")
def fetch() -> None:
    """Fetch and verify the release that the environment names (URM_RELEASE…), for the workers of a pod."""
    from components.recall.serving.fetching import fill_cache
    from components.release.publication import read_environment

    settings = get_settings()
    publication = read_environment(settings)
    if publication is None:
        typer.echo("no release to fetch: URM_RELEASE is empty until the first promotion; workers wait")
        return
    fetched = fill_cache(publication, settings)
    typer.echo(f"release {publication.release} is verified: bundle {fetched.bundle}, features {fetched.features}")


@app.command(rich_help_panel="Run")
def serve(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    host: HostOption = _LOOPBACK,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics; 0: none.")] = 0,
    open_: Annotated[bool, typer.Option("--open", help="Let anybody in who reaches the address.")] = False,
) -> None:
    """Serve the recall API; its documentation is at /docs. Beyond loopback it asks for tokens."""
    import uvicorn

    from components.recall.api.app import create_app
    from components.recall.telemetry.metrics import serve_metrics
    from components.recall.telemetry.setup import open_tracing

    settings = get_settings()
    if host != _LOOPBACK and settings.api_tokens_file is None and not open_:
        raise ConfigError(
            f"recall API on {host}",
            expected="a token file in URM_API_TOKENS_FILE, since others can reach this address",
            got="none",
            remedy="make one with `urm recall token create`, or say --open if a gateway asks for credentials",
        )
    application = create_app(settings, read_config(config, set_).recall, open_tracing(settings, "urm-recall-api"))
    log_as_json()
    if metrics_port:
        serve_metrics(application.state.metrics.registry, host, metrics_port)
    log_config = uvicorn.config.LOGGING_CONFIG if sys.stderr.isatty() else None
    collect_rarely()
    try:
        # Whoever may name the client's address in a header of his own would have a limit of his own for each.
        uvicorn.run(application, host=host, port=port, access_log=False, log_config=log_config, proxy_headers=False)
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:  # uvicorn drains, then passes the signal on to the `urm` command
            return
        if application.state.failure is not None:
            raise application.state.failure from None
        raise UnavailableError(
            f"recall API on {host}:{port}", expected="a free port", got="an error, see above", remedy="choose another"
        ) from error


@app.command(rich_help_panel="Operate")
def backfill(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    shard: Annotated[int, typer.Option(min=0, help="Which part of the users, from 0.")] = 0,
    shards: Annotated[int, typer.Option(min=1, help="Parts, each for a process; a user's is given by a hash.")] = 1,
    rate: Annotated[float, typer.Option(min=0, help="Most users to compute per second; 0: no limit.")] = 0,
    metrics_port: Annotated[int, typer.Option(help="Port of /metrics; 0: none.")] = 0,
    host: HostOption = _LOOPBACK,
    show: Annotated[bool, typer.Option("--show", help="Print how far it is, and compute nothing.")] = False,
) -> None:
    """Give every user known from training results of the serving release; live events come first.

    A user who has them already is left as he is. A shard that was stopped goes on where it was, one that had finished
    starts over.
    """
    from components.recall.operate.show import describe_backfill
    from components.recall.process.launch import run_backfill

    run_config, settings = read_config(config, set_), get_settings()
    if shard >= shards:
        raise ConfigError("option --shard", expected=f"a number below {shards}", got=shard, remedy="correct it")
    if show:
        with _connect(settings.redis_url) as client:
            make_console().print(describe_backfill(client))
        return
    log_as_json()
    run_backfill(settings, run_config, shard, shards, rate, host, metrics_port)


@app.command(rich_help_panel="Operate")
def events(
    file: Annotated[Path, typer.Argument(help="Parquet, CSV or JSONL: event_id, user_id, external_id, …")],
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Feed only the first N.")] = None,
) -> None:
    """Feed events of a file into the stream, in order; feeding a file again is harmless for a day.

    A row that is no event is named, left out, and makes the exit code 2; the others are fed.
    """
    from components.recall.operate.intake import Refusals, feed, read_events, read_finder

    recall, settings = read_config(config, set_).recall, get_settings()
    refusals = Refusals(lambda sentence: typer.echo(sentence, err=True))
    rows = read_events(file, recall.max_future_seconds, refusals, limit=limit)
    with _connect(settings.redis_url) as client:
        finder = cache(lambda: read_finder(client, settings))  # read where a row needs it
        report = feed(client, rows, recall, find=lambda external_id: finder()(external_id))
    for event_id in report.conflicts:
        refusals.add_conflict(event_id)
    typer.echo(f"{report.accepted} accepted, {report.duplicates} accepted before, {refusals.count} refused")
    refusals.require_none(file)


@app.command(rich_help_panel="Operate")
def show(
    user: Annotated[str, typer.Argument(help="User id.")],
    task: Annotated[str, typer.Option(help="Task of the serving release; its first if left out.")] = "",
    k: Annotated[int, typer.Option(min=1, help="Number of items.")] = 20,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Print a user's stored recall beside the live events it knows."""
    from components.recall.operate.show import describe_user

    settings = get_settings()
    with _connect(settings.redis_url) as client:
        make_console().print(describe_user(client, settings, read_config(config, None).recall, user, task, k))


@app.command(rich_help_panel="Operate")
def trace(
    event_id: Annotated[str, typer.Argument(help="As the client sent it, or as the API's answer has it.")],
    user: Annotated[str, typer.Option(help="Its user: an event's id is unique per user.")],
) -> None:
    """Print what became of an event: accepted, waiting, done or given up, and the results that know it."""
    from components.recall.operate.trace import describe_trace, read_tasks, trace_event

    with _connect(get_settings().redis_url) as client:
        found = trace_event(client, event_id, read_tasks(client), user)
    make_console().print(describe_trace(found))


@app.command(rich_help_panel="Operate")
def forget(user: Annotated[str, typer.Argument(help="User id.")]) -> None:
    """Delete everything that Redis holds of a user, and print what that was."""
    from components.recall.operate.forget import forget_user

    with _connect(get_settings().redis_url) as client:
        deleted = forget_user(client, user)
    typer.echo("deleted: " + ", ".join(f"{count} {what}" for what, count in deleted.items()))


@app.command(rich_help_panel="Operate")
def ask(
    user: Annotated[str, typer.Argument(help="User id.")],
    guidance: Annotated[str | None, typer.Option(help='Words that steer the recall: "gift for a child".')] = None,
    task: Annotated[str, typer.Option(help="Task of the serving release; its first if left out.")] = "",
    query: Annotated[str | None, typer.Option(help="The user's words, for tasks that need a query.")] = None,
    k: Annotated[int, typer.Option(min=1, max=1000, help="Number of items.")] = 20,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
) -> None:
    """Print what the model recalls for a user now; needs `urm recall worker --ad-hoc`."""
    from components.recall.operate.show import ask_model
    from components.recall.state.adhoc import AdHocRequest

    settings = get_settings()
    asked = AdHocRequest(user_id=user, task=task, k=k, query=query, guidance=guidance)
    with _connect(settings.redis_url) as client:
        make_console().print(ask_model(client, settings, read_config(config, set_).recall, asked))


@token_app.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Owner; appears in the log of requests.")],
    scope: Annotated[list[str], typer.Option(help="read, write or ask; may be given repeatedly.")],
) -> None:
    """Make a token and print it, this once; the file keeps its digest."""
    from components.recall.api.tokens import Scope, issue_token

    unknown = [one for one in scope if one not in list(Scope)]
    if unknown:
        raise ConfigError("option --scope", expected=" or ".join(Scope), got=unknown[0], remedy="correct it")
    typer.echo(issue_token(_token_file(), name, [Scope(one) for one in scope]))


@token_app.command("list")
def list_tokens() -> None:
    """Print names and scopes."""
    from components.recall.api.tokens import read_tokens

    for token in read_tokens(_token_file()).tokens:
        at = token.created_at.isoformat(timespec="seconds") if token.created_at else ""
        typer.echo("\t".join([token.name, ",".join(token.scopes), at]))


@token_app.command("revoke")
def revoke(name: Annotated[str, typer.Argument(help="As `list` shows it.")]) -> None:
    """Take a token away; running API processes refuse it from then on."""
    from components.recall.api.tokens import revoke_token

    revoke_token(_token_file(), name)


def _token_file() -> Path:
    path = get_settings().api_tokens_file
    if path is None:
        raise ConfigError(
            "setting URM_API_TOKENS_FILE", expected="the path of the token file", got="none", remedy="set it"
        )
    return path


@letters_app.command("list")
def list_letters(limit: Annotated[int, typer.Option(min=1, help="At most so many, oldest first.")] = 100) -> None:
    """Print dead letters with their reasons."""
    from components.recall.operate.deadletters import count_letters
    from components.recall.operate.deadletters import list_letters as read_letters
    from components.recall.operate.terminal import make_table
    from components.recall.operate.terminal import show as show_text

    with _connect(get_settings().redis_url) as client:
        letters, count = read_letters(client, limit), count_letters(client)
    table = make_table("id", "given up at", "tries", "reason", "event")
    for letter in letters:
        at = letter.at.isoformat(timespec="seconds")
        table.add_row(letter.letter_id, at, str(letter.deliveries), show_text(letter.reason), show_text(letter.event))
    make_console().print(table if letters else "no dead letters")
    if count > len(letters):
        typer.echo(f"{count - len(letters)} more; see them with --limit {count}", err=True)


@letters_app.command("replay")
def replay_letters(
    letter_ids: LetterIds = None,
    every: AllOption = False,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
) -> None:
    """Put dead letters back into the event stream, once their cause is fixed."""
    from components.recall.operate.deadletters import replay

    _require_choice(letter_ids, every)
    with _connect(get_settings().redis_url) as client:
        typer.echo(f"{replay(client, letter_ids or [], read_config(config, set_).recall)} replayed")


@letters_app.command("drop")
def drop_letters(letter_ids: LetterIds = None, every: AllOption = False) -> None:
    """Delete dead letters for good."""
    from components.recall.operate.deadletters import drop

    _require_choice(letter_ids, every)
    with _connect(get_settings().redis_url) as client:
        typer.echo(f"{drop(client, letter_ids or [])} dropped")


def _require_choice(letter_ids: list[str] | None, every: bool) -> None:
    if bool(letter_ids) == every:
        raise typer.BadParameter("expected ids or --all, got both or neither; see `urm recall dead-letters list`")


def _connect(url: str) -> "AbstractContextManager[redis.Redis]":
    from components.redis_client import connect

    return connect(url)
