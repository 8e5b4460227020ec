"""JSON lines that a benchmark appends, one for each measurement, so that it goes on where it was stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Lines of earlier runs, none where the file is not there; a last line that was cut off is removed from it."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    """Add a line, and the folder where it is lacking."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
