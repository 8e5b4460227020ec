"""Speed of URM training: packed mixed precision against one example per sequence in float32.

Both train the same model on the same examples with equally many examples per step, through the real training code.
The share of the peak is the floating-point operations of a packed step (counted by torch, forward and backward), by
the time of a step, against the fastest square matrix product measured in the same process.

    python -m benchmarks.throughput --config complete_journey --run-dir default --output throughput.json

needs the stages features and sft of the run.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import find_run, parse_run, write_figures
from components.config import RunConfig
from components.device import has_bfloat16, set_threads
from components.memory import keep_freed_memory
from components.schemas.examples import CONTEXTS, EXAMPLES
from components.settings import get_settings
from components.studies.finished import FinishedRun
from components.urm.data.batch import TrainingBatch
from components.urm.data.examples import TRAINING_OUTPUTS, Groups
from components.urm.inference import UrmRecaller
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.steps import NegativeSampler, TrainingSteps
from components.urm.training.train import train
from components.urm.training.validation import Validation

WARM_UP_STEPS = 3
MATRIX_SIZES = (1024, 2048, 4096)


class ClockedSteps(Dataset[TrainingBatch]):
    """Training steps with the time of each fetch; between two fetches lies one whole step."""

    def __init__(self, steps: TrainingSteps) -> None:
        """Take the steps to be clocked."""
        self.steps = steps
        self.fetched: list[float] = []
        self.examples: list[int] = []

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def __getitem__(self, step: int) -> TrainingBatch:
        """The batch of a step."""
        self.fetched.append(time.perf_counter())
        batch = self.steps[step]
        self.examples.append(len(batch["block_rows"]))
        return batch

    @property
    def seconds_per_step(self) -> float:
        """Mean over the steps after the warm-up."""
        span = self.fetched[WARM_UP_STEPS:]
        return (span[-1] - span[0]) / (len(span) - 1)

    @property
    def examples_per_step(self) -> float:
        """Mean over the steps after the warm-up."""
        counted = self.examples[WARM_UP_STEPS:]
        return sum(counted) / len(counted)


def measure_peak(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of the fastest square matrix product."""
    best = 0.0
    for size in (*MATRIX_SIZES, *([] if device == "cpu" else [8192, 16384])):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(4):
            _synchronise(device)
            start = time.perf_counter()
            left @ right
            _synchronise(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


@dataclass(frozen=True)
class Bench:
    """What every measurement needs.

    Attributes:
        config: The run.
        recaller: Its model; measuring trains it further.
        catalogue: Of schema CATALOGUE.
    """

    config: RunConfig
    recaller: UrmRecaller
    catalogue: pa.Table

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(next(self.recaller.model.parameters()).device)


def run_steps(bench: Bench, groups: Groups, num_steps: int, size: int) -> ClockedSteps:
    """Train for some steps with `size` contexts per step, as the sft stage does."""
    urm = bench.config.urm.model_copy(
        update={"max_steps": num_steps, "eval_steps": num_steps, "contexts_per_batch": size, "max_seconds": 1e9}
    )
    config = bench.config.model_copy(update={"urm": urm})
    sampler = NegativeSampler(bench.catalogue, urm.num_negatives, urm.negative_power)
    builder = bench.recaller.builder
    steps = ClockedSteps(TrainingSteps(groups, builder, sampler, config))
    item_ids = bench.catalogue["item_id"].to_numpy()
    validation = Validation(groups[0][1][:1], item_ids, builder, urm, config.evaluation.k)
    with tempfile.TemporaryDirectory() as scratch:
        train(
            bench.recaller.model.train(),
            steps,
            validation,
            urm,
            checkpoints=Checkpoints(Path(scratch)),
            device=bench.device,
            seed=config.seed,
            report=lambda *_: None,
        )
    return steps


def measure(config: RunConfig, run: FinishedRun, num_steps: int) -> dict[str, Any]:
    """Both speeds, the speed-up, and the share of the peak."""
    contexts = pq.read_table(run.path("features", "contexts"), filters=[("split", "=", "train")])
    tasks = {task.name: task for task in config.tasks}
    examples = pq.read_table(
        run.path("features", TRAINING_OUTPUTS[config.urm.train_cuts].examples), filters=[("split", "=", "train")]
    )
    groups = Groups(contexts, examples, tasks, "train")
    alone = Groups(*_give_contexts(contexts, examples), tasks, "train")
    bench = Bench(config, run.recaller(), pq.read_table(run.path("features", "catalogue")))
    peak = {str(dtype).removeprefix("torch."): measure_peak(dtype, bench.device) for dtype in _dtypes(bench.device)}

    packed = run_steps(bench, groups, num_steps, config.urm.contexts_per_batch)
    flops_per_step = (_count(bench, groups, 3) - _count(bench, groups, 1)) / 2
    with mock.patch("components.device.has_bfloat16", return_value=False):  # there is no setting to turn it off
        single = run_steps(bench, alone, num_steps, round(packed.examples_per_step))
    speeds = [steps.examples_per_step / steps.seconds_per_step for steps in (packed, single)]
    used = flops_per_step / packed.seconds_per_step
    return {
        "device": bench.device,
        "threads": torch.get_num_threads(),
        "packed_examples_per_second": speeds[0],
        "single_examples_per_second": speeds[1],
        "speed_up": speeds[0] / speeds[1],
        "packed_examples_a_step": packed.examples_per_step,
        "peak_gflops": {name: value / 1e9 for name, value in peak.items()},
        "used_gflops": used / 1e9,
        "share_of_peak": used / max(peak.values()),
    }


def _give_contexts(contexts: pa.Table, examples: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The same with a context of its own for every example."""
    rows = pc.index_in(examples["context_id"], value_set=contexts["context_id"].combine_chunks())
    place, ids = CONTEXTS.get_field_index("context_id"), pa.array(range(len(examples)), pa.int64())
    own = EXAMPLES.get_field_index("context_id")
    return contexts.take(rows).set_column(place, "context_id", ids), examples.set_column(own, "context_id", ids)


def _count(bench: Bench, groups: Groups, num_steps: int) -> int:
    """Floating-point operations of a training, including its evaluation."""
    with FlopCounterMode(display=False) as counter:
        run_steps(bench, groups, num_steps, bench.config.urm.contexts_per_batch)
    return int(counter.get_total_flops())


def _dtypes(device: str) -> Sequence[torch.dtype]:
    return (torch.float32, torch.bfloat16) if has_bfloat16(device) else (torch.float32,)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = parse_run(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    keep_freed_memory()  # as the sft stage does
    settings = get_settings()
    set_threads(settings)
    figures = measure(*find_run(arguments, settings), arguments.steps)
    print(json.dumps(figures, indent=2))
    write_figures(arguments.output, figures)


if __name__ == "__main__":
    main()
