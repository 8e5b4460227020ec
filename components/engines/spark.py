"""The one opener of Spark: in local mode, on a cluster's master, or as the driver that spark-submit has started.

Every path that the driver reads and writes must be one path for the executors, too: a folder of this machine in local
mode, a shared volume on a cluster.
"""

import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.operations as ops
import ibis.expr.schema as sch
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
import structlog
from ibis.backends.pyspark import Backend
from ibis.backends.sql.compilers.pyspark import PySparkCompiler
from py4j.protocol import Py4JError, Py4JNetworkError
from pydantic import ByteSize, TypeAdapter
from pyspark import SparkConf
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from components.engines.duckdb import half_of_memory
from components.engines.exhaustion import exhaustion_errors
from components.exceptions import ConfigError, UnavailableError
from components.settings import Settings

log = structlog.get_logger()

_TABLES = "tables"
_ANSWER_SECONDS = 5
_EXECUTOR_SECONDS = 600  # a cluster may have to start machines for them
_PARTITIONS_PER_CORE = 3
_LEAST_MEGABYTES = 512  # Spark refuses a heap below 450
# What equal tables need, whatever the cluster's own configuration says.
_CORRECTNESS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.int96RebaseModeInWrite": "CORRECTED",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.driver.maxResultSize": "0",  # as much as a shard of users gives; the shards are as large as memory allows
    "spark.sql.catalogImplementation": "in-memory",  # tables of the stage live in its scratch folder and end with it
    # Else a job with a task per folder, one per day of the log, lists the files.
    "spark.sql.sources.parallelPartitionDiscovery.threshold": "10000",
    "spark.ui.showConsoleProgress": "false",
    "spark.log.level": "ERROR",
}


class _Compiler(PySparkCompiler):  # type: ignore[misc]  # as below
    """Ibis' own, but lists are sorted by Spark's compiled order and not, pair by pair, by a lambda that it interprets.

    The two differ in where nulls stand; the lists that the stages sort have none.
    """

    SIMPLE_OPS: ClassVar = {ops.ArraySort: "sort_array"}


class SparkEngine(Backend):  # type: ignore[misc]  # a class of Any to mypy, since Ibis has no types
    """Ibis' Spark engine with paths of the working directory, schemas like DuckDB's, and results by Arrow."""

    memory: int  # bytes of the smaller heap, of an executor or of the driver
    folder: Path  # folder of the stage's tables
    compiler = _Compiler()

    def create_table(self, name: str, /, obj: Any = None, *, temp: bool = False, **options: Any) -> ir.Table:
        """As Ibis, which refuses temporary tables; here all are, since they end with the stage."""
        return super().create_table(name, obj, **options)

    def read_parquet(self, path: str | Path, /, *, table_name: str | None = None, **options: Any) -> ir.Table:
        """As Ibis; a relative path is one of this process's working directory, not of the JVM's."""
        place = path if "://" in str(path) else os.path.abspath(path)
        return super().read_parquet(place, table_name=table_name, **options)

    def get_schema(self, table_name: str, **where: Any) -> sch.Schema:
        """As Ibis, but every column may be null and instants have microseconds, as DuckDB says of the same tables."""
        schema = super().get_schema(table_name, **where)
        return sch.Schema({name: _as_duckdb(kind) for name, kind in schema.items()})

    def _create_cached_table(self, name: str, expr: ir.Table) -> ir.Table:
        """As Ibis, but in files: later plans are short, and an executor that is lost takes none of it along."""
        return self.create_table(name, expr)

    def _drop_cached_table(self, name: str) -> None:
        self.drop_table(name)

    def to_pyarrow(self, expr: ir.Expr, /, *, params: Any = None, limit: Any = None, **options: Any) -> Any:
        """As Ibis, but not by way of pandas, which has no lists and no integers with nulls."""
        self._run_pre_execute_hooks(expr)
        table = expr.as_table()
        result: pa.Table = self._session.sql(self.compile(table, params=params, limit=limit)).toArrow()
        return expr.__pyarrow_result__(result.cast(table.schema().to_pyarrow()))

    def to_pyarrow_batches(
        self, expr: ir.Expr, /, *, chunk_size: int = 65_536, **options: Any
    ) -> Iterator[pa.RecordBatch]:
        """As Ibis, but executors write the rows to files, of which the driver holds one batch at a time."""
        name = f"batches_{uuid4().hex}"
        table = self.create_table(name, expr.as_table())
        schema = table.schema().to_pyarrow()
        # Spark names files by partition, and the partitions of a sorted result follow one another.
        for path in sorted((self.folder / name).glob("*.parquet")):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=chunk_size):
                    yield from pa.Table.from_batches([batch]).cast(schema).to_batches()
        self.drop_table(name)


@contextmanager
def open_engine(spill: Path, settings: Settings) -> Iterator[ibis.BaseBackend]:
    """A Spark session that is also Ibis' default backend, so that Feast's Ibis offline store uses it too.

    `engine_memory` is the heap of each executor and of the driver, which in local mode are one. Without it, a cluster's
    own configuration says how large they are, and the smaller is the limit. The stage's tables, and in local mode what
    does not fit in memory, go to the folder `spill`.

    Raises:
        ConfigError: Java is missing, the memory is too small for Spark or the body, or executors do not see `spill`.
        UnavailableError: The master does not answer, Spark ended, or the disk is full.
    """
    shutil.rmtree(spill / _TABLES, ignore_errors=True)  # of an attempt that was ended
    spill.mkdir(parents=True, exist_ok=True)
    session = _start(spill.absolute(), settings)
    context = session.sparkContext
    on_cluster = not str(context.master).startswith("local")
    memory = _megabytes(settings)
    if on_cluster and not settings.engine_memory:
        memory = min(_heap(session, "executor"), _heap(session, "driver"))
    SparkEngine.register_options()
    engine = SparkEngine()
    engine.memory = memory << 20
    engine.folder = spill.absolute() / _TABLES
    engine.do_connect(session)
    before = ibis.options.default_backend
    ibis.set_backend(engine)
    try:
        with exhaustion_errors(spill, f"{memory}MiB"), _ended_errors():
            if on_cluster:
                _await_executor(session)
                _require_shared(engine, spill.absolute())
                if "spark.sql.shuffle.partitions" not in dict(context.getConf().getAll()):
                    partitions = _PARTITIONS_PER_CORE * context.defaultParallelism
                    session.conf.set("spark.sql.shuffle.partitions", partitions)
            yield engine
    finally:
        ibis.options.default_backend = before
        with suppress(Py4JError, OSError):  # a Spark that has ended; the body's error says so
            engine.disconnect()


def memory_limit(engine: SparkEngine) -> int:
    """Bytes of the smaller heap: an executor computes a part at once, and the driver collects it."""
    return engine.memory


def read_folder(engine: SparkEngine, folder: Path) -> ir.Table:
    """All Parquet files below a folder; what a folder's name says, `name=value`, becomes a column."""
    return engine.read_parquet(folder)


def read_numbered(engine: SparkEngine, paths: Sequence[Path]) -> ir.Table:
    """These Parquet files with the columns `_file`, the absolute path, and `_position`, the row's number in it."""
    rows = engine._session.read.parquet(*(str(path.absolute()) for path in paths))
    name = f"numbered_{uuid4().hex}"
    path = "regexp_replace(url_decode(replace(_metadata.file_path, '+', '%2B')), '^file:(//)?', '')"
    rows.selectExpr("*", f"{path} AS _file", "_metadata.row_index AS _position").createTempView(name)
    return engine.table(name)


def write_parts(engine: SparkEngine, table: ir.Table, folder: Path, column: str) -> None:
    """Add a table to Parquet files in a folder per value of a column."""
    engine.to_parquet(table, folder.absolute(), mode="append", partitionBy=column)


def _start(spill: Path, settings: Settings) -> SparkSession:
    """A session of its own; what it does not set is what spark-defaults.conf or spark-submit says."""
    memory = f"{_megabytes(settings)}m"
    conf = SparkConf().setAll(list(_CORRECTNESS.items()))
    conf.setAppName("urm").set("spark.sql.warehouse.dir", str(spill / _TABLES))
    master = settings.spark_master
    if master == "local[*]" and settings.num_threads:
        master = f"local[{settings.num_threads}]"
    if master:
        conf.setMaster(master)
    if master.startswith("spark://"):
        _require_answer(master)
    if master.startswith("k8s://"):
        _set_driver(conf, settings)
    if master.startswith("local"):
        conf.set("spark.local.dir", str(spill)).set("spark.driver.memory", memory)
        conf.set("spark.ui.enabled", "false").set("spark.driver.host", "127.0.0.1")
        conf.set("spark.sql.shuffle.partitions", str(settings.num_threads or os.cpu_count() or 1))
    elif settings.engine_memory:
        conf.set("spark.executor.memory", memory).set("spark.driver.memory", memory)
    try:
        return SparkSession.builder.config(conf=conf).getOrCreate()
    except (PySparkException, Py4JError, OSError) as error:
        if "JAVA_GATEWAY_EXITED" in str(error):
            raise ConfigError(
                "setting URM_ENGINE",
                expected="Java 17 or 21 for spark",
                got="none that starts",
                remedy="install a Java runtime, set JAVA_HOME, or unset URM_ENGINE",
            ) from None
        raise UnavailableError(
            f"Spark at {master or 'the master of its configuration'}",
            expected="a session",
            got=_first_line(error),
            remedy="correct URM_SPARK_MASTER",
        ) from error


def _set_driver(conf: SparkConf, settings: Settings) -> None:
    """What a driver in a pod says of itself: how executors reach it, and that they end with it."""
    conf.set("spark.kubernetes.namespace", settings.namespace)
    if settings.spark_driver_host:
        conf.set("spark.driver.host", settings.spark_driver_host)
    if settings.spark_driver_pod:
        conf.set("spark.kubernetes.driver.pod.name", settings.spark_driver_pod)


def _require_answer(master: str) -> None:
    """Refuse a standalone master that is down; Spark itself tries for a minute, and then ends with a traceback.

    Raises:
        ConfigError: The address is none.
        UnavailableError: Nobody answers there.
    """
    got: object = "no answer"
    for place in master.removeprefix("spark://").split(","):  # of several, one leads
        host, _, port = place.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(
                "setting URM_SPARK_MASTER",
                expected="spark://host:port[,host:port]",
                got=master,
                remedy="correct it; the port of a master is usually 7077",
            )
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
        except OSError as error:
            got = error
        else:
            return
    raise UnavailableError(
        f"Spark at {master}", expected="an answer", got=got, remedy="start the master or correct URM_SPARK_MASTER"
    )


def _await_executor(session: SparkSession) -> None:
    """Wait for the first executor: without one, Spark would wait for ever.

    Raises:
        UnavailableError: None came.
    """
    java: Any = session.sparkContext._jsc
    deadline = time.monotonic() + _EXECUTOR_SECONDS
    log.info("waiting for an executor", master=session.sparkContext.master, at_most_seconds=_EXECUTOR_SECONDS)
    while java.sc().getExecutorMemoryStatus().size() < 2:  # the driver is one
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"Spark at {session.sparkContext.master}",
                expected=f"an executor within {_EXECUTOR_SECONDS} s",
                got="none",
                remedy="start workers, or lower URM_ENGINE_MEMORY or spark.executor.cores to what they have free",
            )
        time.sleep(0.2)


def _megabytes(settings: Settings) -> int:
    """The heap that the settings allow: `engine_memory`, else half of what this machine has."""
    text = settings.engine_memory
    if not text:
        with closing(ibis.duckdb.connect().con) as free:
            text = half_of_memory(ibis.duckdb.from_connection(free))
    if (megabytes := TypeAdapter(ByteSize).validate_python(text) >> 20) < _LEAST_MEGABYTES:
        raise ConfigError(
            "setting URM_ENGINE_MEMORY",
            expected=f"at least {_LEAST_MEGABYTES}MiB for spark",
            got=text,
            remedy="raise it, or use the engine duckdb",
        )
    return megabytes


def _heap(session: SparkSession, of: str) -> int:
    """Megabytes that Spark's configuration gives `executor` or `driver`."""
    java: Any = session.sparkContext._jvm
    text = session.sparkContext.getConf().get(f"spark.{of}.memory", "1g")
    return int(java.org.apache.spark.network.util.JavaUtils.byteStringAsMb(text))


def _require_shared(engine: SparkEngine, spill: Path) -> None:
    """Refuse a cluster whose executors do not see the files of this machine."""
    probe = spill / "probe.txt"
    probe.write_text("seen")
    try:
        seen = engine._session.read.text(str(probe)).count()
    except PySparkException:
        seen = 0
    if seen != 1:
        raise ConfigError(
            f"folder {spill}",
            expected="one that Spark's executors see under the same path",
            got="no such file there",
            remedy="keep run directories and URM_CACHE_DIR on a volume that driver and executors share",
        )


@contextmanager
def _ended_errors() -> Iterator[None]:
    try:
        yield
    except (Py4JNetworkError, ConnectionError) as error:
        raise UnavailableError(
            "Spark", expected="a running driver", got=_first_line(error), remedy="raise URM_ENGINE_MEMORY, or try again"
        ) from error


def _as_duckdb(kind: dt.DataType) -> dt.DataType:
    if kind.is_array():
        return dt.Array(_as_duckdb(kind.value_type))
    if kind.is_map():
        return dt.Map(kind.key_type, _as_duckdb(kind.value_type))
    if kind.is_struct():
        return dt.Struct({name: _as_duckdb(each) for name, each in kind.items()})
    if kind.is_timestamp():
        return dt.Timestamp(timezone="UTC", scale=6)
    return kind(nullable=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
