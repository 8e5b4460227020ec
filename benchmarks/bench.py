"""What the benchmarks of the recall runtime share: a finished run's release, its users, their requests."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from components.config import RunConfig, load_named_config
from components.device import choose_device, set_threads
from components.settings import Settings
from components.studies.finished import FinishedRun, hide_progress_bars
from components.urm.data.request import RecallRequest, UserContext, read_contexts
from components.urm.inference import UrmRecaller

QUERY = "frozen pizza"  # asked of tasks that need one
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bench:
    """A release with users to serve.

    Attributes:
        config: Of its run.
        bundle: Its files.
        recaller: Its model.
        users: One list of requests per user: all tasks, of one shared context.
    """

    config: RunConfig
    bundle: Path
    recaller: UrmRecaller
    users: Sequence[Sequence[RecallRequest]]


def open_bench(config: RunConfig, run: FinishedRun, settings: Settings, num_users: int, seed: int = 0) -> Bench:
    """Load the release of a run (stage `release`), and draw users of its test weeks (stage `features`)."""
    hide_progress_bars()
    set_threads(settings)
    bundle = run.path("release", "bundle")
    recaller = load_recaller(bundle, settings)
    table = pq.read_table(run.path("features", "contexts"), filters=[("split", "=", "test")])
    contexts = list(read_contexts(table).values())
    chosen = np.random.default_rng(seed).permutation(len(contexts))[:num_users]
    return Bench(config, bundle, recaller, [ask_all(config, contexts[place]) for place in chosen])


def load_recaller(bundle: Path, settings: Settings) -> UrmRecaller:
    """The model of a bundle, as a worker loads it."""
    return UrmRecaller.load(
        bundle / "model", bundle / "item_table", bundle / "index.faiss", device=choose_device(settings)
    )


def ask_all(config: RunConfig, context: UserContext) -> list[RecallRequest]:
    """Every task asked of one user."""
    return [RecallRequest(context, task, QUERY if task.needs_query else None) for task in config.tasks]


def parse_run(description: str | None) -> argparse.ArgumentParser:
    """A command line that names a run and the JSON file for its figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="complete_journey")
    parser.add_argument("--run-dir", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser


def find_run(arguments: argparse.Namespace, settings: Settings) -> tuple[RunConfig, FinishedRun]:
    """The configuration and the run that the command line names."""
    config = load_named_config(arguments.config, settings.configs_dir, arguments.set)
    return config, FinishedRun(settings.find_run_dir(arguments.run_dir), settings)


def config_options(arguments: argparse.Namespace) -> list[str]:
    """The configuration of that command line, for a `urm` command."""
    return ["--config", arguments.config, *(part for value in arguments.set for part in ("--set", value))]


def report(message: str, **figures: Any) -> None:
    """Print how far a benchmark has come."""
    print(message, *(f"{name} {value}" for name, value in figures.items()), flush=True)


def write_figures(output: Path, figures: Any) -> None:
    """Write them as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n")


def query_gpu(what: str) -> str:
    """Fields of the GPUs, as `nvidia-smi --query-gpu` names them; empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader")
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().replace("\n", "; ")


def describe(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def alternate(repeats: int, *works: Callable[[], float]) -> list[list[float]]:
    """Results of each function, one list per function; they take turns, so that a slow minute affects all of them."""
    turns = [[work() for work in works] for _ in range(repeats)]
    return [list(column) for column in zip(*turns, strict=True)]
