"""Text of users on a terminal: data, never markup and never control sequences, and whole."""

from rich.table import Column, Table
from rich.text import Text


def show(text: str) -> Text:
    """The text as it is, its control characters and bytes that are no text as escapes."""
    return Text("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


def make_table(*columns: str, title: Text | None = None) -> Table:
    """A table that breaks what is wider than its column, where others would cut ids and figures."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title, title_justify="left")
