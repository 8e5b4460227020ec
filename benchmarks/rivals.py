"""Puts rivals that were trained anew beside a URM whose hits were kept, so that URM need not be trained again.

    python -m benchmarks.rivals --config amazon_toys --set seed=0 .urm/runs/tuned \
        benchmarks/evaluations/amazon_toys-seed0 benchmarks/evaluations/amazon_toys-tuned-seed0
    urm compare benchmarks/evaluations/amazon_toys-tuned-seed0 …

The run needs the stages up to `baseline`, with the seed of the record. Its test examples must be those of the record:
the same users, tasks and held-out queries. Of URM only the cut-offs that the record has are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from benchmarks.bench import find_run
from benchmarks.keep import CUTOFFS, write_evaluation, write_result
from components.addresses import fetch
from components.config import RunConfig
from components.evaluation.bootstrap import compare
from components.evaluation.examples import TestExamples, measure
from components.evaluation.metrics import recall
from components.evaluation.summary import (
    BASELINE,
    CANDIDATE,
    find_best_other,
    mean_recalls,
    order_models,
    record_hits,
    split_tasks,
    summarise,
)
from components.exceptions import DataError
from components.schemas.hits import HITS
from components.settings import get_settings
from components.storage import require_result
from components.studies.finished import FinishedRun


def join(run: FinishedRun, config: RunConfig, record: str, folder: Path) -> None:
    """Write a record of the run's rivals and the record's URM.

    Raises:
        MissingInputError: The run has no predictions, or the record no evaluation.
        DataError: The examples of the two differ.
    """
    kept = require_result(record, "evaluate")
    urm = pq.read_table(fetch(kept.outputs["hits"], run.settings.cache_path / "inputs"), schema=HITS).to_pandas()
    rivals, urm = _number(measure_rivals(run, config)), _number(urm[urm["model"] == CANDIDATE])
    examples = [_examples(hits) for hits in (rivals, urm)]
    if kept.metrics["seed"] != config.seed or not examples[0].equals(examples[1]):
        raise DataError(
            f"record {record}",
            expected=f"URM with seed {config.seed} on the {len(examples[0]):,} test examples of run {run.run_dir}",
            got=f"seed {kept.metrics['seed']}, {len(examples[1]):,} examples, perhaps others",
            remedy="name the record of the same configuration and seed",
        )
    hits, training = pd.concat([rivals, urm], ignore_index=True), require_result(run.run_dir, "baseline")
    evaluation = training.model_copy(update={"stage": "evaluate", "metrics": _summarise(hits, config)})
    write_evaluation(evaluation, hits, folder)
    write_result(training, folder, {})


def measure_rivals(run: FinishedRun, config: RunConfig) -> pd.DataFrame:
    """Hits of every model whose predictions the run has, at the cut-offs that are kept, in the schema HITS."""
    examples = pq.read_table(run.path("features", "examples"), filters=pc.field("split") == "test")
    contexts, catalogue = (pq.read_table(run.path("features", name)) for name in ("contexts", "catalogue"))
    held_out = [task.name for task in config.tasks if task.target.held_out_query]
    test, k = TestExamples.build(examples, contexts, catalogue, held_out), config.evaluation.k
    lists = ds.dataset(str(run.path("baseline", "predictions")))
    names = pc.unique(lists.to_table(columns=["model"]).column("model")).to_pylist()
    parts = []
    for model in order_models(names):
        mine = lists.to_table(columns=["example_id", "item_ids"], filter=pc.field("model") == model)
        parts.append(record_hits(test, model, measure(test, mine, model, k).ranked, sorted({*CUTOFFS, k})))
    return pd.concat(parts, ignore_index=True)


def _number(hits: pd.DataFrame) -> pd.DataFrame:
    """Number the examples of every model and cut-off alike: by user and task, those of the same in their own order."""
    ordered = hits.sort_values(["model", "k", "user_id", "task", "example_id"], ignore_index=True)
    return ordered.assign(example_id=ordered.groupby(["model", "k"]).cumcount())


def _examples(hits: pd.DataFrame) -> pd.DataFrame:
    """Users, tasks, numbers of targets and held-out queries of the examples."""
    some = hits[(hits["model"] == hits["model"].iloc[0]) & (hits["k"] == hits["k"].max())]
    found: pd.DataFrame = some[["user_id", "task", "targets", "held_out_query"]]
    return found.fillna({"held_out_query": ""}).reset_index(drop=True)


def _summarise(hits: pd.DataFrame, config: RunConfig) -> dict[str, Any]:
    """Metrics of an evaluation, as far as hits give them."""
    k = config.evaluation.k
    rows = hits[hits["k"] == k]
    recalls = rows.assign(recall=recall(rows["hits"], rows["targets"], rows["k"]))
    table = recalls.groupby(["task", "model"])["recall"].mean().rename(f"recall@{k}").reset_index()
    headline, _ = split_tasks(config, list(dict.fromkeys(rows["task"])))
    best = find_best_other(mean_recalls(table[table["task"].isin(headline)], k))
    draws = config.evaluation.bootstrap_samples
    against = {other: compare(rows, CANDIDATE, other, k=k, draws=draws, seed=config.seed) for other in {BASELINE, best}}
    return summarise(table, against[BASELINE], against[best], config)


def main() -> None:
    """Join what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    parser.add_argument("record", help="with the hits of URM")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    config, run = find_run(options, get_settings())
    join(run, config, options.record, options.folder)
    print(f"{options.folder}: rivals of {options.run_dir} beside URM of {options.record}")


if __name__ == "__main__":
    main()
