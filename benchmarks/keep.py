"""Keeps an evaluation beside the code, small enough for the repository and enough to recompute its comparison.

    python -m benchmarks.keep .urm/runs/results-amazon_sports-seed0 benchmarks/evaluations/amazon_sports-seed0
    urm compare benchmarks/evaluations/amazon_sports-seed0 …

Kept are the metrics, and of each example whether URM, target attention and the best other model found its target among
the first k items. Seeds trained on different days or machines can so be pooled when all of them are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.addresses import fetch, write_json
from components.evaluation.comparison import read_run
from components.evaluation.schema import HITS
from components.evaluation.summary import BASELINE, CANDIDATE
from components.settings import get_settings
from components.storage import load_result

_DICTIONARIES = ["task", "model", "k", "hits", "targets"]
_ENCODINGS = {"example_id": "DELTA_BINARY_PACKED", "user_id": "DELTA_BYTE_ARRAY"}


def keep_evaluation(run_dir: str, folder: Path, cache: Path) -> int:
    """Write the part of an evaluation that `urm compare` needs, as a run directory of its own.

    Args:
        run_dir: Folder or URI of the evaluated run.
        folder: Where it goes.
        cache: For remote files.

    Returns:
        Bytes written.

    Raises:
        MissingInputError: The run has no evaluation.
    """
    run = read_run(run_dir)
    models = [CANDIDATE, *{BASELINE, run.metrics["best_other"]["model"]}]
    wanted = [("k", "==", run.metrics["k"]), ("model", "in", models)]
    hits = pd.read_parquet(fetch(run.hits, cache), filters=wanted)
    # Numbered anew in the order of users, so that both columns take little room; still one number an example.
    hits = hits.sort_values(["model", "user_id", "task", "example_id"])
    hits["example_id"] = hits.groupby("model").cumcount()
    target = folder / "evaluate" / "hits.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(hits, HITS, preserve_index=False)
    pq.write_table(
        table,
        target,
        compression="zstd",
        compression_level=19,
        use_dictionary=_DICTIONARIES,
        column_encoding=_ENCODINGS,
    )
    result = load_result(run_dir, "evaluate")
    if result is not None:  # read_run has seen it
        kept = result.model_copy(update={"outputs": {"hits": target.name}, "reused_from": None})
        write_json(str(target.parent / "result.json"), kept.model_dump(mode="json"))
    return sum(path.stat().st_size for path in target.parent.iterdir())


def main() -> None:
    """Keep the evaluation named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    size = keep_evaluation(options.run_dir, options.folder, get_settings().cache_path / "inputs")
    print(f"{options.folder}: {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
