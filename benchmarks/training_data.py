"""Memory and time of the training data: opened as `sft` and as `baseline` do, then read batch by batch.

    python -m benchmarks.training_data --config scale --run-dir default --reader sft --output lines.jsonl

needs `features` for `sft`, and `encode` as well for `baseline`. One JSON line: contexts and examples, seconds to open,
milliseconds per batch (as large as a training step's), and the memory of the process: what is its own, and the pages
of memory-mapped files that it has read, which the machine may take back. Nothing is trained.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.bench import find_run, parse_run
from benchmarks.lines import append_line
from components.baseline.batches import Batcher
from components.baseline.data import load_dataset
from components.baseline.training import shuffle_batches
from components.config import RunConfig
from components.device import set_threads
from components.settings import get_settings
from components.studies.finished import FinishedRun
from components.urm.data.examples import TRAINING_OUTPUTS, read_groups

Opened = tuple[dict[str, int], Iterator[Any]]  # how many of what; batches as they are asked for


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one reader and append the line."""
    parser = parse_run(__doc__)
    parser.add_argument("--reader", choices=READERS, required=True)
    parser.add_argument("--batches", type=int, default=200)
    options = parser.parse_args(arguments)
    settings = get_settings()
    set_threads(settings)
    config, run = find_run(options, settings)
    with tempfile.TemporaryDirectory(dir=settings.home) as folder:
        line = measure(lambda: READERS[options.reader](config, run, Path(folder)), options.batches)
    append_line(options.output, {"reader": options.reader, "config": config.name} | line)


def measure(read: Callable[[], Opened], num_batches: int) -> dict[str, float]:
    """What opening costs, what the first batches cost, and the memory before and after."""
    process = psutil.Process()
    before, mapped, started = _own_bytes(process), process.memory_info().shared, time.monotonic()
    counts, batches = read()
    opened, opened_bytes = time.monotonic(), _own_bytes(process)
    num_read = sum(1 for _ in islice(batches, num_batches))
    read_seconds = time.monotonic() - opened
    return {
        **counts,
        "open_seconds": round(opened - started, 1),
        "batches": num_read,
        "milliseconds_per_batch": round(1000 * read_seconds / max(1, num_read), 1),
        "own_bytes_before": before,
        "own_bytes_opened": opened_bytes,
        "own_bytes_read": _own_bytes(process),
        "mapped_bytes_read": process.memory_info().shared - mapped,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # mapped pages included
    }


def _own_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def open_sft(config: RunConfig, run: FinishedRun, folder: Path) -> Opened:
    """Training and validation examples by context; batches are the contexts of a training step, in a random order."""
    contexts = run.path("features", "contexts")
    training = read_groups(
        contexts, run.path("features", TRAINING_OUTPUTS[config.urm.train_cuts].examples), config, "train", folder
    )
    validation = read_groups(contexts, run.path("features", "examples"), config, "validation", folder)
    counts = {
        "contexts": len(training),
        "examples": int(training.num_examples.sum()),
        "validation_examples": int(validation.num_examples.sum()),
    }

    def read() -> Iterator[Any]:
        order = np.random.default_rng(config.seed).permutation(len(training))
        for start in range(0, len(order), config.urm.contexts_per_batch):
            yield [training[place] for place in order[start : start + config.urm.contexts_per_batch].tolist()]

    return counts, read()


def open_baseline(config: RunConfig, run: FinishedRun, folder: Path) -> Opened:
    """The data set of the rivals; batches are those of target attention."""
    catalogue, contexts, examples = (run.path("features", name) for name in ("catalogue", "contexts", "examples"))
    items, table = run.path("validate", "items"), run.path("encode", "item_table")
    data = load_dataset(catalogue, items, table, contexts, examples, config.tasks, folder)
    rows = data.examples.rows("train")
    batcher = Batcher(data, config.baseline.history_length)
    counts = {"contexts": len(data.contexts.users), "examples": len(rows), "items": len(data.items)}
    return counts, (batcher.training(chosen) for chosen in shuffle_batches(data, rows, config.baseline, config.seed))


READERS: dict[str, Callable[[RunConfig, FinishedRun, Path], Opened]] = {"sft": open_sft, "baseline": open_baseline}


if __name__ == "__main__":
    main()
