import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from components.addresses import fetch
from components.flow import STUDIES
from components.storage import load_result, run_stage
from components.studies.ablation.measure import run
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller


def test_recall_of_every_validation_example(finished, settings, tmp_path):
    run_dir, config = finished
    result = run_stage(STUDIES["measure"], run, config=config, run_dir=str(run_dir), settings=settings)
    recalls = pd.read_parquet(result.outputs["recalls"]).set_index("example_id")

    features, sft = (load_result(str(run_dir), stage).outputs for stage in ("features", "sft"))
    contexts = read_contexts(pq.read_table(features["contexts"]))
    recaller = UrmRecaller.load(*(fetch(sft[name], tmp_path) for name in ("model", "item_table", "candidates")))
    rows = [row for row in pq.read_table(features["examples"]).to_pylist() if row["split"] == "validation"]
    assert sorted(recalls.index) == [row["example_id"] for row in rows]
    for row in rows:
        request = RecallRequest(contexts[row["context_id"]], config.task(row["task"]), row["query"])
        found = recaller.recall([request], config.evaluation.k)[0][0]
        expected = len(set(found.tolist()) & set(row["target_item_ids"])) / len(row["target_item_ids"])
        assert recalls.loc[row["example_id"], "recall"] == pytest.approx(expected)

    by_task = recalls.groupby("task")["recall"].mean()
    assert result.metrics["mean_recall"] == pytest.approx(float(np.mean(by_task)))
    assert 0 < result.metrics["mean_recall"] < 1
