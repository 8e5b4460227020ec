"""`urm releases`: who promoted what; `urm rollback`: an earlier release again."""

from typing import Annotated

import typer

from components.cli.options import DEFAULT_CONFIG, ConfigOption, SetOption, make_console, read_config
from components.exceptions import ConfigError
from components.recall.operate.terminal import make_table
from components.settings import get_settings

app = typer.Typer(invoke_without_command=True, help="Releases: who promoted what, when, why, and what serves.")


@app.callback()
def list_releases(context: typer.Context, config: ConfigOption = DEFAULT_CONFIG, set_: SetOption = None) -> None:
    """Print the releases of the registry, newest promotion first, and which of them serves."""
    if context.invoked_subcommand is not None:
        source = context.get_parameter_source("config")
        if set_ or (source is not None and source.name == "COMMANDLINE"):
            raise ConfigError(
                "urm releases",
                expected=f"options behind the command {context.invoked_subcommand!r}",
                got="--config or --set before it",
                remedy="put them there",
            )
        return
    from components.deploy.releases import list_promotions

    rows, unknown = list_promotions(get_settings(), read_config(config, set_).release)
    table = make_table("promoted", "release", "now", "by", "why", "measured", "gate")
    for row in rows:
        note = row.note
        measured = ", ".join(f"{key} {value:g}" for key, value in note.items() if key not in ("by", "why", "at"))
        state, verdict = row.gate
        gate = f"{state}: {verdict.split('. ')[0]}" if verdict and row.now else state  # the whole stands in MLflow
        who = [note.get("by"), note.get("why"), measured, gate]
        table.add_row(note.get("at", "never"), row.release, ", ".join(row.now), *who)
    console = make_console()
    console.print(table if rows else "no release is registered yet; `urm release` makes one", markup=False)
    if unknown:
        typer.echo(f"what serves is unknown: {unknown}", err=True)


@app.command()
def sync(config: ConfigOption = DEFAULT_CONFIG, set_: SetOption = None) -> None:
    """Make the release that serves the champion, for instance after `kubectl rollout undo`."""
    from components.deploy.promotion import synchronize

    run_config = read_config(config, set_)
    release = synchronize(get_settings(), run_config.release, run_config.recall)
    typer.echo("nothing serves, nothing changed" if release is None else f"{release} serves and is the champion")


def rollback(
    why: Annotated[str, typer.Option(help="The reason; `urm releases` shows it.")],
    to: Annotated[str, typer.Option(help="Release to go to; by default the one that served before.")] = "",
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = None,
) -> None:
    """Promote an earlier release; the champion becomes `previous`."""
    from components.deploy.promotion import rollback as roll_back

    run_config = read_config(config, set_)
    deployment = roll_back(get_settings(), run_config.release, run_config.recall, to=to, why=why)
    typer.echo(f"serving {deployment['release']} (version {deployment['version']}) in {deployment['seconds']} s")
