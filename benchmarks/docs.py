"""Fills the tables in the documentation, or checks that they are what it would write.

    python -m benchmarks.docs           # writes
    python -m benchmarks.docs --check   # exit code 1 and a sentence per block that differs

A block stands in README.md or in a Markdown file under docs/ or k8s/, each marker on a line of its own:

    <!-- table: NAME -->
    (written by this command)
    <!-- /table -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import ablation_tables, claims, flow_tables, records, rival_tables
from benchmarks.records import Table
from components.exceptions import UrmError, UserError

REPOSITORY = Path(__file__).parents[1]
FILES = ("README.md", "docs/**/*.md", "k8s/**/*.md")
MODULES = (flow_tables, records, ablation_tables, claims, rival_tables)
TABLES: dict[str, Table] = {name: table for module in MODULES for name, table in module.TABLES.items()}
_MARKER = re.compile(r"^<!--\s*(?:table:\s*(?P<name>\S+)|/table)\s*-->$", re.MULTILINE)


def fill(text: str, source: str, tables: Mapping[str, Table]) -> tuple[str, list[str]]:
    """Write the table of each block.

    Args:
        text: Markdown.
        source: Name of the file, for errors.
        tables: Tables by name; only those that the text names are computed.

    Returns:
        The text with its tables, and the names of the blocks whose content changed.

    Raises:
        UserError: A block names an unknown table, or a marker has no partner.
    """
    parts: list[str] = []
    changed: list[str] = []
    end = 0
    for name, start, stop in _find_blocks(text, source):
        if name not in tables:
            raise UserError(
                f"{source}, table {name!r}",
                expected=f"one of {', '.join(sorted(tables))}",
                got="an unknown name",
                remedy="correct the marker or register the table in benchmarks/docs.py",
            )
        table = f"\n{tables[name]()}\n"
        if table != text[start:stop]:
            changed.append(name)
        parts += [text[end:start], table]
        end = stop
    return "".join([*parts, text[end:]]), changed


def _find_blocks(text: str, source: str) -> Iterator[tuple[str, int, int]]:
    """Name, start and end of the text between the markers of each block."""
    opened: re.Match[str] | None = None
    for marker in _MARKER.finditer(text):
        if (opened is None) == (marker["name"] is None):
            raise _unpaired(opened or marker, source)
        if opened is not None:
            yield opened["name"], opened.end(), marker.start()
        opened = marker if opened is None else None
    if opened is not None:
        raise _unpaired(opened, source)


def _unpaired(marker: re.Match[str], source: str) -> UserError:
    line = marker.string.count("\n", 0, marker.start()) + 1
    partner = "a start marker before it" if marker["name"] is None else "`<!-- /table -->` after it"
    return UserError(
        f"{source}, line {line}, marker `{marker[0]}`", expected=partner, got="none", remedy="pair the two markers"
    )


def main(arguments: Sequence[str] | None = None, root: Path = REPOSITORY, tables: Mapping[str, Table] = TABLES) -> int:
    """Write or check every file; the exit code is 1 where a check finds a difference, 2 for a faulty marker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a table differs")
    check = parser.parse_args(arguments).check
    code = 0
    try:
        for path in sorted(path for pattern in FILES for path in root.glob(pattern)):
            source = str(path.relative_to(root))
            text, changed = fill(path.read_text(), source, tables)
            for name in changed if check else ():
                print(f"{source}: table {name!r} is not what `python -m benchmarks.docs` writes; run it.")
                code = 1
            if changed and not check:
                path.write_text(text)
                print(f"{source}: wrote {', '.join(changed)}")
    except UrmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
