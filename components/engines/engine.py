"""The engine that the settings name, and what its two kinds do each in its own way.

All else is Ibis expressions, which are the same for both.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import ibis
import ibis.expr.types as ir

from components.engines import duckdb
from components.exceptions import ConfigError
from components.settings import Settings


def open_engine(spill: Path, settings: Settings) -> AbstractContextManager[ibis.BaseBackend]:
    """The engine of `URM_ENGINE`, which is also Ibis' default while it is open, so that Feast uses it too.

    Raises:
        ConfigError: Spark or Java is not installed; or, within, the body needs more memory than is allowed.
        UnavailableError: Spark's master does not answer; or, within, the disk is full.
    """
    opened: AbstractContextManager[ibis.BaseBackend] = _module(settings.engine).open_engine(spill, settings)
    return opened


def require_duckdb(stage: str, settings: Settings) -> None:
    """Refuse another engine for what only DuckDB computes.

    Raises:
        ConfigError: `URM_ENGINE` names another.
    """
    if settings.engine != "duckdb":
        raise ConfigError(
            f"setting URM_ENGINE, stage {stage}",
            expected="duckdb, the only engine of this stage",
            got=settings.engine,
            remedy="unset it for this stage; `validate` and `features` run on Spark",
        )


def memory_limit(engine: ibis.BaseBackend) -> int:
    """Bytes that the engine may hold in memory; of Spark, one executor or the driver, whichever has less."""
    return int(_module(engine.name).memory_limit(engine))


def holds_joins(engine: ibis.BaseBackend) -> bool:
    """Whether a join needs memory for its rows; Spark lets them pass, in order, and spills what it sorts."""
    return bool(engine.name == "duckdb")


def read_folder(engine: ibis.BaseBackend, folder: Path) -> ir.Table:
    """All Parquet files below a folder; what a folder's name says, `name=value`, becomes a column."""
    return _module(engine.name).read_folder(engine, folder)


def read_numbered(engine: ibis.BaseBackend, paths: Sequence[Path]) -> ir.Table:
    """These Parquet files with the columns `_file`, the absolute path, and `_position`, the row's number in it."""
    return _module(engine.name).read_numbered(engine, paths)


def write_parts(engine: ibis.BaseBackend, table: ir.Table, folder: Path, column: str) -> None:
    """Add a table to Parquet files, in a folder per value of a column."""
    _module(engine.name).write_parts(engine, table, folder, column)


def _module(name: str) -> ModuleType:
    if name == "duckdb":
        return duckdb
    try:
        from components.engines import spark  # an extra of its own
    except ImportError as error:
        raise ConfigError(
            "setting URM_ENGINE",
            expected="the packages of spark",
            got=error,
            remedy="install them, `pip install 'urm-recall[spark]'`, or unset it",
        ) from None
    return spark
