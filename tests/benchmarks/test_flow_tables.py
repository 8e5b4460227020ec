"""Every stage, study and output of the flow has a row in the tables of the documentation."""

from benchmarks.flow_tables import TABLES
from components.flow import STAGES, STUDIES


def test_every_stage_and_every_output_has_its_row() -> None:
    rows = TABLES["stages"]().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| `{name}`" for name in STAGES]
    for table, specs in (("outputs", STAGES), ("studies", STUDIES)):
        assert len(TABLES[table]().splitlines()) == 2 + sum(len(spec.outputs) for spec in specs.values())
