"""Keeps what a run found beside the code, small enough for the repository and enough to recompute its comparison.

    python -m benchmarks.keep .urm/runs/results-amazon_sports-seed0 benchmarks/evaluations/amazon_sports-seed0
    urm compare benchmarks/evaluations/amazon_sports-seed0 …

    python -m benchmarks.keep .urm/runs/<study>.h_1.seed0 benchmarks/evaluations/<study>.h_1.seed0
    urm ablation summary --run-dir benchmarks/evaluations/<study> …

Of an evaluation are kept its metrics, and of each example what every model found of its targets among the first 5, 10,
20, 100 and k items, with NDCG at 5 and 10; of a variant of an ablation study its recall of each validation example; of
both what the trainings measured and how long they took. Seeds and variants trained on different days or machines can so
be put together when all of them are there. The largest data set, Sports with eight models, takes 3 MB a seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.addresses import fetch, write_json
from components.exceptions import MissingInputError
from components.schemas.hits import HITS
from components.settings import get_settings
from components.storage import StageResult, load_result

CUTOFFS = (5, 10, 20, 100)  # kept beside the headline's
NDCG_CUTOFFS = (5, 10)  # NDCG at others is in the metrics only
_DICTIONARIES = ["task", "model", "k", "hits", "targets", "recall", "ndcg", "held_out_query", "cut_ts"]
_ENCODINGS = {"example_id": "DELTA_BINARY_PACKED", "user_id": "DELTA_BYTE_ARRAY"}
_TRAININGS = ("baseline", "sft")


def keep(run_dir: str, folder: Path, cache: Path) -> int:
    """Write the part of a run that `urm compare` or `urm ablation summary` needs, as a run directory of its own.

    Args:
        run_dir: Folder or URI of a run that was evaluated, or measured as a variant of a study.
        folder: Where it goes.
        cache: For remote files.

    Returns:
        Bytes written.

    Raises:
        MissingInputError: The run has neither an evaluation nor a measurement.
    """
    evaluation, measurement = (load_result(run_dir, stage) for stage in ("evaluate", "measure"))
    if evaluation is None and measurement is None:
        raise MissingInputError(
            f"run {run_dir}",
            expected="a result of stage 'evaluate' or 'measure'",
            got="none",
            remedy="run `urm evaluate` or `urm ablation measure` on it",
        )
    if evaluation is not None:
        wanted = [("k", "in", sorted({*CUTOFFS, evaluation.metrics["k"]}))]
        hits = pq.read_table(fetch(evaluation.outputs["hits"], cache), schema=HITS, filters=wanted).to_pandas()
        write_evaluation(evaluation, hits, folder)
    if measurement is not None:
        recalls = pd.read_parquet(fetch(measurement.outputs["recalls"], cache))
        table = pa.Table.from_pandas(recalls.sort_values(["user_id", "example_id"]), preserve_index=False)
        _write(table, folder / "measure" / "recalls.parquet")
        write_result(measurement, folder, {"recalls": "recalls.parquet"})
    for training in (load_result(run_dir, stage) for stage in _TRAININGS):
        if training is not None:
            write_result(training, folder, {})
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_evaluation(evaluation: StageResult, hits: pd.DataFrame, folder: Path) -> None:
    """Write the result of an evaluation with its per-example record, in the schema HITS."""
    hits.loc[~hits["k"].isin(NDCG_CUTOFFS), "ndcg"] = None
    # Numbered anew in the order of users, so that columns take little room; still one number an example.
    hits = hits.sort_values(["model", "k", "user_id", "task", "example_id"])
    hits["example_id"] = hits.groupby(["model", "k"]).cumcount()
    _write(pa.Table.from_pandas(hits, HITS, preserve_index=False), folder / "evaluate" / "hits.parquet")
    write_result(evaluation, folder, {"hits": "hits.parquet"})


def write_result(result: StageResult, folder: Path, outputs: dict[str, str]) -> None:
    """Write the result of a stage, its outputs given by their paths beside it."""
    kept = result.model_copy(update={"outputs": outputs, "reused_from": None})
    write_json(str(folder / result.stage / "result.json"), kept.model_dump(mode="json"))


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=_among(table, _DICTIONARIES),
        column_encoding={name: _ENCODINGS[name] for name in _among(table, _ENCODINGS)},
    )


def _among(table: pa.Table, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in table.column_names]


def main() -> None:
    """Keep the run named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    size = keep(options.run_dir, options.folder, get_settings().cache_path / "inputs")
    print(f"{options.folder}: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
