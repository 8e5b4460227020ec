"""The opener of DuckDB: its limits are those of the settings."""

from pathlib import Path

import ibis
import pytest
from pydantic import ValidationError

from components.engines.duckdb import open_engine
from components.settings import Settings


def limits(engine: ibis.BaseBackend) -> tuple[str, int, str]:
    row = engine.raw_sql(
        "SELECT current_setting('memory_limit'), current_setting('threads'), current_setting('temp_directory')"
    ).fetchone()
    return row[0], int(row[1]), row[2]


def test_memory_threads_and_spill_folder_are_those_given(tmp_path: Path) -> None:
    with open_engine(tmp_path / "spill", Settings(engine_memory="512MiB", num_threads=1)) as engine:
        assert limits(engine) == ("512.0 MiB", 1, str(tmp_path / "spill"))


def test_memory_is_bounded_by_default(tmp_path: Path) -> None:
    with open_engine(tmp_path, Settings()) as engine:
        assert limits(engine)[0] == "1.3 GiB"  # 1500 MB


def test_it_is_the_default_backend_until_it_is_closed(tmp_path: Path) -> None:
    before = ibis.options.default_backend
    with pytest.raises(KeyError), open_engine(tmp_path, Settings(num_threads=1)) as engine:
        assert ibis.get_backend() is engine
        raise KeyError
    assert ibis.options.default_backend is before


@pytest.mark.parametrize("memory", ["", "much", "-1GB", "80%", "8"])
def test_a_limit_that_duckdb_cannot_read_is_refused_at_once(memory: str) -> None:
    with pytest.raises(ValidationError, match="engine_memory"):
        Settings(engine_memory=memory)
