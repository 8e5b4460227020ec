"""Options that several commands share, and what they read."""

from typing import Annotated

import typer
from rich.console import Console

from components.config import RunConfig, load_named_config
from components.settings import Settings, get_settings

DEFAULT_CONFIG: str = Settings.model_fields["config"].default
PIPE_WIDTH = 140  # columns, where the output goes to a file or a pipe

ConfigOption = Annotated[
    str,
    typer.Option(
        "--config", "-c", envvar="URM_CONFIG", help="Run configuration: a YAML file, or the name of one in configs/."
    ),
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


def read_config(name: str, overrides: list[str] | None) -> RunConfig:
    """The configuration that the options name."""
    return load_named_config(name, get_settings().configs_dir, overrides or [])


def make_console(*, soft_wrap: bool = False) -> Console:
    """A console that keeps its width in a pipe, so that tables stay whole; `soft_wrap` leaves long lines whole, too."""
    console = Console(soft_wrap=soft_wrap)
    return console if console.is_terminal else Console(soft_wrap=soft_wrap, width=PIPE_WIDTH)
