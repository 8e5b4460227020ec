import gzip
from pathlib import Path

import ibis
import pytest

from components.config import TableSource
from components.exceptions import DataError
from components.ingestion.ragged import find_ragged_row
from components.ingestion.sources import read_table, readable_errors

HEADER = "user_id,item_id,behavior,scenario,ts\n"
ROW = '1,"2 or 3",view,web,2020-01-01\n'


@pytest.mark.parametrize(("ragged", "fields"), [("1,2,view,web,2020-01-01,x\n", 6), ("1,2,view\n", 3)])
@pytest.mark.parametrize("before", [2, 3_000, 60_000])  # DuckDB fails in three ways
def test_a_row_of_another_length_is_named(
    tmp_path: Path, connection: ibis.BaseBackend, before: int, ragged: str, fields: int
) -> None:
    (tmp_path / "good.csv").write_text(HEADER + 5 * ROW)
    (tmp_path / "wrong.csv").write_text(HEADER + before * ROW + ragged + 5 * ROW)
    (tmp_path / "items.csv").write_text("item_id,title\n2,cola\n")
    source = TableSource(events=f"{tmp_path}/[gw]*.csv", items=f"{tmp_path}/items.csv")
    sentence = rf"source\.events .*: expected rows with as many fields as the header, got {tmp_path}/wrong\.csv, line "
    sentence += rf"{before + 2}: {fields} fields where the header has 5; .*quote"
    with pytest.raises(DataError, match=sentence), readable_errors(source):
        read_table(source, "events", connection).raw.to_pyarrow()


def test_rows_of_one_length_are_not_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(HEADER.replace(",", ";") + '1;"a\nb";2;"c;d";3\n\n')
    (tmp_path / "b.csv").write_text("one column\na,b\n")
    assert find_ragged_row("events", f"{tmp_path}/*.csv") == ""
    assert find_ragged_row("events", f"{tmp_path}/none.csv") == ""
    with gzip.open(tmp_path / "c.csv.gz", "wt") as stream:
        stream.write(HEADER + ROW + "1,2\n")
    assert find_ragged_row("events", f"{tmp_path}/*.csv*") == (
        f"{tmp_path}/c.csv.gz, line 3: 2 fields where the header has 5"
    )


@pytest.mark.parametrize("name", ["Size (S|M|L|XL)", '"Size (S|M|L|XL)"'])
def test_a_name_with_more_separators_than_columns_is_no_ragged_row(
    tmp_path: Path, connection: ibis.BaseBackend, name: str
) -> None:
    (tmp_path / "items.csv").write_text(f"item_id,title,{name}\n" + 5 * "2,cola,M\n")
    source = TableSource(events=f"{tmp_path}/items.csv", items=f"{tmp_path}/items.csv")
    assert read_table(source, "items", connection).raw.to_pyarrow().num_rows == 5
    with (tmp_path / "items.csv").open("a") as stream:
        stream.write("3,cola,M,L\n")
    assert find_ragged_row("items", source.items) == f"{tmp_path}/items.csv, line 7: 4 fields where the header has 3"
