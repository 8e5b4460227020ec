"""The opener of DuckDB: its limits are those of the settings."""

import sqlite3
from contextlib import closing
from pathlib import Path

import duckdb
import ibis
import pytest
from pydantic import ValidationError

from components.engines.duckdb import open_engine, read_folder
from components.exceptions import ConfigError, UnavailableError
from components.settings import Settings


def limits(engine: ibis.BaseBackend) -> tuple[str, int, str]:
    row = engine.raw_sql(
        "SELECT current_setting('memory_limit'), current_setting('threads'), current_setting('temp_directory')"
    ).fetchone()
    return row[0], int(row[1]), row[2]


def test_memory_threads_and_spill_folder_are_those_given(tmp_path: Path) -> None:
    with open_engine(tmp_path / "spill", Settings(engine_memory="512MiB", num_threads=1)) as engine:
        assert limits(engine) == ("512.0 MiB", 1, str(tmp_path / "spill"))


def test_memory_is_by_default_half_of_what_is_there(tmp_path: Path) -> None:
    with open_engine(tmp_path, Settings()) as engine, duckdb.connect() as free:
        (by_itself,) = free.execute("SELECT current_setting('memory_limit')").fetchone()
        number, unit = by_itself.split()
        ours, our_unit = limits(engine)[0].split()
    assert unit == our_unit
    assert float(ours) / (float(number) / 0.8) == pytest.approx(0.5, rel=0.05)


LARGE = "SELECT md5(i::VARCHAR) AS a, md5((i + 1)::VARCHAR) AS b FROM range(1000000) rows(i)"


@pytest.mark.parametrize("how", ["execute", "arrow"])
def test_what_does_not_fit_in_memory_names_the_setting(tmp_path: Path, how: str) -> None:
    query = f"SELECT list(a ORDER BY b) AS everything FROM ({LARGE})"  # noqa: S608 - the text above
    with (
        pytest.raises(ConfigError, match=r"setting URM_ENGINE_MEMORY: expected more memory.*, got 40MB; raise it"),
        open_engine(tmp_path, Settings(engine_memory="40MB", num_threads=1)) as engine,
    ):
        if how == "execute":
            engine.raw_sql(query).fetchall()
        else:
            engine.sql(query).to_pyarrow()


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(UnavailableError, match=rf"disk of {tmp_path}: expected room .* got a full disk; free it"),
        open_engine(tmp_path, Settings(engine_memory="40MB", num_threads=1)) as engine,
    ):
        engine.raw_sql("SET max_temp_directory_size = '5MB'")  # what is free, otherwise
        engine.raw_sql(f"CREATE TABLE large AS {LARGE}")


def test_a_full_disk_under_sqlite_is_one(tmp_path: Path) -> None:
    with (
        pytest.raises(UnavailableError, match=rf"disk of {tmp_path}: expected room .* got a full disk; free it"),
        open_engine(tmp_path, Settings(num_threads=1)),
        closing(sqlite3.connect(tmp_path / "online.db")) as online,
    ):
        online.execute("PRAGMA max_page_count = 4")
        online.execute(
            "CREATE TABLE large AS WITH rows(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM rows LIMIT 9999) "
            "SELECT hex(i) AS a FROM rows"
        )


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(duckdb.CatalogException), open_engine(tmp_path, Settings(num_threads=1)) as engine:
        engine.raw_sql("SELECT * FROM nothing")


def test_it_is_the_default_backend_until_it_is_closed(tmp_path: Path) -> None:
    before = ibis.options.default_backend
    with pytest.raises(KeyError), open_engine(tmp_path, Settings(num_threads=1)) as engine:
        assert ibis.get_backend() is engine
        raise KeyError
    assert ibis.options.default_backend is before


@pytest.mark.parametrize("memory", ["much", "-1GB", "80%", "8"])
def test_a_limit_that_duckdb_cannot_read_is_refused_at_once(memory: str) -> None:
    with pytest.raises(ValidationError, match="engine_memory"):
        Settings(engine_memory=memory)


def test_a_folder_is_no_pattern(tmp_path: Path) -> None:
    """Its name may have brackets and stars; a folder beside it that they would match is another one."""
    with open_engine(tmp_path / "spill", Settings(num_threads=1)) as engine:
        for number, name in enumerate(["exp[1]", "exp1", "a*", "ab"]):
            for part in ("month=1", "month=2"):
                (tmp_path / name / part).mkdir(parents=True)
                engine.to_parquet(ibis.memtable({"n": [number]}), tmp_path / name / part / "part.parquet")
        for number, name in enumerate(["exp[1]", "exp1", "a*", "ab"]):
            found = read_folder(engine, tmp_path / name).order_by("month").to_pyarrow()
            assert found.to_pydict() == {"n": [number, number], "month": [1, 2]}
