"""The tables of the flow in the documentation are what the flow says today."""

from __future__ import annotations

import re

import pytest

from benchmarks.flow_tables import TABLES
from components.flow import STAGES, STUDIES
from tests.worlds import REPOSITORY

BLOCK = re.compile(r"<!-- table: (\w+) -->\n(.*?)\n?<!-- /table -->", re.DOTALL)
WRITTEN = {
    name: text
    for page in ("README.md", "docs/architecture.md")
    for name, text in BLOCK.findall((REPOSITORY / page).read_text())
}


@pytest.mark.parametrize("name", TABLES)
def test_the_documentation_has_the_table(name: str) -> None:
    assert WRITTEN[name] == TABLES[name]()


def test_every_stage_and_every_output_has_its_row() -> None:
    rows = TABLES["stages"]().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| `{name}`" for name in STAGES]
    for table, specs in (("outputs", STAGES), ("studies", STUDIES)):
        assert len(TABLES[table]().splitlines()) == 2 + sum(len(spec.outputs) for spec in specs.values())
