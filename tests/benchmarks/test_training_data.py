import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.training_data import READERS, measure
from components.memory import trim_memory
from components.settings import Settings
from components.studies.finished import FinishedRun
from tests.worlds.baseline import *  # noqa: F403  # fixtures
from tests.worlds.baseline import World
from tests.worlds.tables import put


@pytest.mark.parametrize("reader", ["sft", "baseline"])
def test_a_reader_reads_what_its_stage_trains_on(reader, world: World, tmp_path):
    files = {name: world.folder / f"{name}.parquet" for name in ("catalogue", "contexts", "examples")}
    put(tmp_path / "run", "validate", {"items": world.folder / "items.parquet"})
    put(tmp_path / "run", "features", files | {"recent_examples": files["examples"]})
    put(tmp_path / "run", "encode", {"item_table": world.folder / "item_table"})
    run = FinishedRun(str(tmp_path / "run"), Settings(home=tmp_path))
    line = measure(lambda: READERS[reader](world.config, run, tmp_path), num_batches=3)

    examples = pq.read_table(files["examples"], filters=[("split", "=", "train")]).to_pandas()
    contexts = pq.read_table(files["contexts"]).to_pandas()
    if reader == "sft":
        recent = contexts["cut_ts"] >= world.config.features.split.recent_start
        examples = examples[examples["context_id"].isin(contexts["context_id"][recent])]
    assert line["examples"] == len(examples) > 0
    assert line["contexts"] == (examples["context_id"].nunique() if reader == "sft" else len(contexts))
    assert line["batches"] == 3


def test_memory_of_its_own_is_told_from_mapped_files(tmp_path):
    np.ones(50_000_000, dtype=np.int64).tofile(tmp_path / "mapped")
    mapped, kept = np.memmap(tmp_path / "mapped", dtype=np.int64, mode="r"), []
    trim_memory()  # after a training, glibc keeps what was freed and gives it again

    def read():
        kept.append(np.ones(25_000_000, dtype=np.int64))
        return {"contexts": 3}, (mapped[start::4096].sum() for start in (0, 512, 1024))

    line = measure(read, num_batches=2)
    assert line["own_bytes_opened"] - line["own_bytes_before"] == pytest.approx(200e6, abs=20e6)
    assert line["own_bytes_read"] == pytest.approx(line["own_bytes_opened"], abs=20e6)
    assert line["mapped_bytes_read"] > 80e6
    assert line["contexts"] == 3
    assert line["batches"] == 2
