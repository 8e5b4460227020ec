"""`urm data fetch`: the public data sets."""

from pathlib import Path
from typing import Annotated

import typer

from components.settings import get_settings

app = typer.Typer(no_args_is_help=True, help="Public data sets.")


@app.callback()
def data() -> None:
    """Keep `fetch` a sub-command."""


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="amazon_beauty, amazon_sports or amazon_toys.")],
    to: Annotated[Path, typer.Option("--to", help="Folder of data sets; each gets a folder of its name.")] = Path(
        "data"
    ),
) -> None:
    """Download a public data set, check its files, and write the tables that its configuration reads."""
    from components.ingestion import public

    folder = public.fetch(name, to, get_settings().cache_path / "public", public.read_registry())
    typer.echo(f"{folder}: sequences.txt.gz and items.parquet")
