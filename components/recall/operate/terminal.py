"""Text of users on a terminal: data, never markup and never control sequences."""

from rich.text import Text


def show(text: str) -> Text:
    """The text as it is, its control characters and bytes that are no text as escapes."""
    return Text("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))
