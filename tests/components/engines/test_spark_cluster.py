"""Spark's standalone master and worker, of pyspark's own jars, as the engine's cluster: equal rows, whatever dies."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.engines import spark as spark_module
from components.engines.engine import memory_limit, open_engine
from components.exceptions import ConfigError, UnavailableError
from components.features import examples as examples_module
from tests.worlds import run_python, wait_until
from tests.worlds import spark as world
from tests.worlds.servers import free_port
from tests.worlds.spark import run_stages, with_engine, write_log
from tests.worlds.tables import put

pyspark = pytest.importorskip("pyspark", reason="the extra `spark` is not installed; `make` adds it where Java is")
pytestmark = world.MARKS
java = world.java  # the driver's
DEPLOY = "org.apache.spark.deploy"
WORKER = ("--cores", 1, "--memory", "700m", "--port", 0, "--webui-port", 0, "--work-dir")
SMALL_JAVA = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=64m"


@contextmanager
def daemon(name: str, folder: Path, *arguments: object) -> Iterator[psutil.Process]:
    """A process of Spark's own, ended with its executors."""
    command = [Path(pyspark.__file__).parent / "bin" / "spark-class", f"{DEPLOY}.{name}", "--host", "127.0.0.1"]
    environment = {
        **os.environ,
        "SPARK_DAEMON_JAVA_OPTS": SMALL_JAVA,
        "SPARK_DAEMON_MEMORY": "128m",
        "SPARK_LOCAL_DIRS": str(folder),
    }
    environment |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([*command, *map(str, arguments)], env=environment, stdout=log, stderr=log)
    found = psutil.Process(process.pid)
    try:
        yield found
    finally:
        executors = found.children(recursive=True)
        process.terminate()
        process.wait()
        for executor in executors:
            with suppress(psutil.NoSuchProcess):
                executor.kill()


@contextmanager
def master(folder: Path) -> Iterator[str]:
    """The address of a master that listens."""
    port = free_port()
    with daemon("master.Master", folder, "--port", port, "--webui-port", 0) as process:

        def listens() -> bool:
            assert process.status() != psutil.STATUS_ZOMBIE, (folder / "master.Master.log").read_text()
            return any(each.laddr.port == port and each.status == "LISTEN" for each in process.net_connections())

        wait_until(listens, 120)
        yield f"spark://127.0.0.1:{port}"


def executors_of(worker: psutil.Process) -> list[psutil.Process]:
    living = [each for each in worker.children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
    return [each for each in living if "ExecutorBackend" in " ".join(each.cmdline())]


def kill_at_work(worker: psutil.Process, killed: list[int]) -> None:
    """Kill the executor while a task runs on it."""
    tracker = pyspark.SparkContext._active_spark_context.statusTracker()

    def works() -> bool:
        stages = [tracker.getStageInfo(number) for number in tracker.getActiveStageIds()]
        return any(stage is not None and stage.numActiveTasks for stage in stages)

    wait_until(works, 600)
    (executor,) = executors_of(worker)
    executor.kill()
    killed.append(executor.pid)


def test_tables_are_those_of_duckdb_though_an_executor_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = write_log(tmp_path / "tables", seed=3)
    monkeypatch.setattr(world, "TASKS", world.TASKS[:2])
    expected = run_stages(tmp_path / "duckdb", tables, "duckdb")
    killed: list[int] = []
    with master(tmp_path) as address, daemon("worker.Worker", tmp_path, *WORKER, tmp_path / "work", address) as worker:
        window_events, killer = (
            examples_module.window_events,
            threading.Thread(target=kill_at_work, args=(worker, killed)),
        )

        def start_and_find(*arguments: Any) -> Any:
            if killer.ident is None:
                killer.start()
            return window_events(*arguments)

        monkeypatch.setattr(examples_module, "window_events", start_and_find)
        found = run_stages(tmp_path / "spark", tables, "spark", spark_master=address)
        killer.join()
    assert killed
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        assert found[name].to_pylist() == table.to_pylist(), name


def test_the_smaller_heap_of_the_cluster_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    with master(tmp_path) as address, daemon("worker.Worker", tmp_path, *WORKER, tmp_path / "work", address):
        settings = with_engine(tmp_path, "spark", spark_master=address, engine_memory="")
        for executor, driver in (("600m", "520m"), ("500m", "1g")):
            heaps = {"spark.executor.memory": executor, "spark.driver.memory": driver}
            monkeypatch.setattr(spark_module, "_CORRECTNESS", spark_module._CORRECTNESS | heaps)
            with open_engine(tmp_path / "spill", settings) as engine:
                found.append(memory_limit(engine))
    assert found == [520 << 20, 500 << 20]


def test_a_cluster_without_workers_is_no_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spark_module, "_EXECUTOR_SECONDS", 0)
    with (
        master(tmp_path) as address,
        pytest.raises(UnavailableError, match=rf"Spark at {address}: expected an executor within 0 s, got none; start"),
        open_engine(tmp_path / "spill", with_engine(tmp_path, "spark", spark_master=address)),
    ):
        pass


@pytest.mark.parametrize(("stage", "earlier"), [("validate", "ingest"), ("features", "validate")])
def test_a_master_that_is_down_is_one_sentence(stage: str, earlier: str, tmp_path: Path) -> None:
    put(tmp_path / "run", earlier, write_log(tmp_path / "tables", seed=3))
    address = f"spark://127.0.0.1:{free_port()}"
    settings = {"URM_ENGINE": "spark", "URM_SPARK_MASTER": address, "URM_HOME": str(tmp_path / "home")}
    command = ("-m", "components", stage, "--config", "complete_journey", "--run-dir", tmp_path / "run")
    ended = run_python(*command, env={**os.environ, **settings}, timeout=300)
    assert ended.returncode == UnavailableError.exit_code
    assert f"Spark at {address}: expected an answer, got [Errno 111] Connection refused; start" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run" / stage / "result.json").exists()


def test_an_address_without_a_port_is_refused(tmp_path: Path) -> None:
    settings = with_engine(tmp_path, "spark", spark_master="spark://somewhere")
    with (
        pytest.raises(ConfigError, match=r"URM_SPARK_MASTER: expected spark://host:port.*, got spark://somewhere"),
        open_engine(tmp_path / "spill", settings),
    ):
        pass
