"""`validate` and `features` on Spark: pods of Airflow's tasks are the drivers, and start executors (component `spark`).

The images `urm-pipeline-spark` and `apache/spark` must be there for the nodes, and this machine must be a node: driver
and executors share a folder of it. Stand-ins without a cluster: tests/components/engines, tests/dags.
"""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from components.config import load_config
from components.settings import Settings
from components.stages import features, ingest, validate
from components.storage import run_stage
from tests.cluster.airflow import TRAINING
from tests.cluster.flow import SMALL, VALUES, Training, open_flow
from tests.cluster.world import COMPONENTS, Kubectl, Object, pause_until
from tests.worlds import CONFIGS, REPOSITORY
from tests.worlds.spark import DEFAULTS, INTERPRETED

pytestmark = pytest.mark.timeout(1800)

STAGES = {"ingest": ingest, "validate": validate, "features": features}
DRIVERS = ("validate", "features")
ENGINE = {"URM_ENGINE": "spark", "URM_SPARK_MASTER": "k8s://https://kubernetes.default.svc"}
ENGINE |= {"URM_ENGINE_MEMORY": "600MB"}
ROW = {"image": "urm-pipeline-spark:0.1.0", "cache_claim": "urm-cache"}
SIZES = {"spark.executor.instances": "2", "spark.executor.cores": "1"}
SIZES |= {"spark.kubernetes.executor.request.cores": "200m", "spark.executor.memoryOverhead": "400m"}
LESS_WORK = [line for line in (DEFAULTS + INTERPRETED).splitlines() if line and "127.0.0.1" not in line]
CLAIM, EXECUTORS = "urm-cache", "app.kubernetes.io/component=spark-executor"


class Spark(Training):
    """The flow, with two executors per driver."""

    def executors(self) -> list[Object]:
        """Executors of all drivers that run and are not ending."""
        return [pod for pod in self.kubectl.pods("spark-executor") if pod["status"]["phase"] == "Running"]

    def wait_for_executors(self) -> list[Object]:
        """Both executors, running."""
        pause_until(lambda: len(self.executors()) == 2, 300)
        return self.executors()

    def tables(self, run_id: str, folder: Path) -> dict[str, pa.Table]:
        """Every table that the drivers left."""
        store = fsspec.filesystem("s3")
        store.invalidate_cache()
        for stage in DRIVERS:
            store.get(f"{self.run_dir(run_id)}/{stage}/", f"{folder}/{stage}/", recursive=True)
        return read_tables(folder)


def read_tables(folder: Path) -> dict[str, pa.Table]:
    """Parquet files of the drivers' stages, by stage, output and place in it."""
    found = {}
    for stage in DRIVERS:
        outputs = json.loads((folder / stage / "result.json").read_text())["outputs"]
        for name, uri in outputs.items():
            place = folder / stage / uri.partition(f"/{stage}/")[2]
            for path in sorted(place.rglob("*.parquet")) if place.is_dir() else [place]:
                found[f"{stage}/{name}/{path.relative_to(place)}"] = pq.ParquetFile(path).read()
    return found


@pytest.fixture(scope="module")
def volume(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A volume of this machine's disk that many pods may write to."""
    name, folder = f"urm-test-{secrets.token_hex(3)}", tmp_path_factory.mktemp("cache")
    folder.chmod(0o777)
    for parent in (*folder.parents[:2], folder):  # pytest's own folders are its user's alone
        parent.chmod(parent.stat().st_mode | 0o011)
    spec = {
        "capacity": {"storage": "50Gi"}, "accessModes": ["ReadWriteMany"], "storageClassName": "",
        "hostPath": {"path": str(folder), "type": "Directory"}, "persistentVolumeReclaimPolicy": "Retain",
    }  # fmt: skip
    given = yaml.safe_dump({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec})
    kubectl("apply", "--filename", "-", given=given)
    yield name
    kubectl("delete", "persistentvolume", name, "--wait=false")


@pytest.fixture(scope="module")
def spark(kubectl: Kubectl, volume: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spark]:
    """The flow with the components `cache` and `spark`, whose executors are small."""
    conf = (REPOSITORY / "k8s" / "components" / "spark" / "spark-defaults.conf").read_text()
    kept = "".join(line for line in conf.splitlines(keepends=True) if line.split()[0] not in SIZES)
    kept += "\n".join([*(f"{name} {value}" for name, value in SIZES.items()), *LESS_WORK, ""])
    place = [{"op": "add", "path": "/spec/storageClassName", "value": ""}]
    place += [{"op": "add", "path": "/spec/volumeName", "value": volume}]
    sizes = [{"op": "replace", "path": "/data/spark-defaults.conf", "value": kept}]
    patches = [
        {"target": {"kind": "PersistentVolumeClaim", "name": CLAIM}, "patch": yaml.safe_dump(place)},
        {"target": {"kind": "ConfigMap", "name": "urm-spark"}, "patch": yaml.safe_dump(sizes)},
    ]
    home = tmp_path_factory.mktemp("airflow")
    with open_flow(home, ENGINE, components=[*COMPONENTS, "cache", "spark"], patches=patches) as flow:
        found = Spark(flow.kubectl, flow.airflow, flow.pods_file)
        found.change_pods(**dict.fromkeys(DRIVERS, ROW))
        yield found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """The tables of the same log on DuckDB, of this machine."""
    home = tmp_path_factory.mktemp("duckdb")
    config = load_config(CONFIGS / "complete_journey.yaml", VALUES)
    settings = Settings(home=home, configs_dir=CONFIGS, feature_repo_dir=REPOSITORY / "feature_repo", engine="duckdb")
    for name, stage in STAGES.items():
        run_stage(name, stage.run, config=config, run_dir=str(home / "run"), settings=settings)
    return read_tables(home / "run")


def require_equal(found: dict[str, pa.Table], expected: dict[str, pa.Table]) -> None:
    """Equal tables: schema, rows, order, lists."""
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        assert found[name].schema.equals(table.schema), name
        assert found[name].to_pylist() == table.to_pylist(), name


def delete(spark: Spark, pod: Object) -> None:
    """As a node that is lost does."""
    spark.kubectl("delete", "pod", pod["metadata"]["name"], "--force", "--grace-period=0", "--wait=false")


def await_work(spark: Spark) -> tuple[Object, set[str]]:
    """The driver of `features`, which has read the log, and the names of its executors."""
    driver = spark.wait_for_pod("features", seconds=900)
    name = driver["metadata"]["name"]
    pause_until(lambda: "choosing examples" in spark.kubectl("logs", name, fails=True), 900)
    executors = spark.wait_for_executors()
    for pod in executors:
        (owner,) = pod["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"]) == ("Pod", name)
    return driver, {pod["metadata"]["name"] for pod in executors}


@pytest.fixture(scope="module")
def run_id(spark: Spark) -> str:
    """A run whose `validate` and `features` have ended, one of whose executors died; nothing after them begins."""
    started = str(spark.airflow.client.trigger(TRAINING, {"overrides": SMALL, "force": True}))
    assert spark.airflow.wait(started, "validate", 900)["state"] == "success", spark.airflow.log(started, "validate", 1)
    spark.airflow.mark(started, "encode", "failed")  # it would take processors
    _, names = await_work(spark)
    delete(spark, next(pod for pod in spark.executors() if pod["metadata"]["name"] in names))
    pause_until(lambda: {pod["metadata"]["name"] for pod in spark.executors()} - names, 300)
    assert spark.airflow.wait(started, "features", 900)["state"] == "success", spark.airflow.log(started, "features", 1)
    spark.airflow.end_run(TRAINING, started)
    spark.wait_until_gone()
    return started


def test_executors_make_the_tables_of_duckdb_and_go(
    spark: Spark, run_id: str, expected: dict[str, pa.Table], tmp_path: Path
) -> None:
    """Also where one of them is lost, which costs no try."""
    require_equal(spark.tables(run_id, tmp_path), expected)
    assert len(expected["features/examples/."]) > 100
    pause_until(lambda: not spark.kubectl.read("pods", "--selector", EXECUTORS)["items"], 60)
    assert [spark.airflow.task(run_id, stage)["try_number"] for stage in DRIVERS] == [1, 1]


def test_a_driver_that_is_lost_takes_its_executors_along_and_is_followed_by_another(
    spark: Spark, run_id: str, expected: dict[str, pa.Table], tmp_path: Path
) -> None:
    spark.wait_until_idle(run_id)
    spark.airflow.clear(run_id, "features")
    driver, names = await_work(spark)
    delete(spark, driver)
    pause_until(lambda: not names & {pod["metadata"]["name"] for pod in spark.executors()}, 300)
    task = spark.airflow.wait(run_id, "features", 900)
    assert (task["state"], task["try_number"]) == ("success", 2), spark.airflow.log(run_id, "features", 2)
    require_equal(spark.tables(run_id, tmp_path), expected)
