"""One training of the tiny world, callable from a test or as a process: `python -m tests.worlds.training`."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pyarrow.parquet as pq
import torch

from components.caches import CachePlace
from components.config import RunConfig
from components.items.table import ItemTable
from components.urm.data.examples import read_examples
from components.urm.network.build import NewModel, build_model
from components.urm.network.model import Urm
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.steps import NegativeSampler, TrainingSteps
from components.urm.training.train import TrainingSummary, train
from components.urm.training.validation import Validation
from tests.worlds import REPOSITORY
from tests.worlds.servers import free_port

TABLES = ("catalogue", "contexts", "examples")


def write_world(folder: Path, tables: object, table_dir: Path, config: RunConfig) -> None:
    """Put all that a training reads into a folder."""
    for name in TABLES:
        pq.write_table(getattr(tables, name), folder / f"{name}.parquet")
    (folder / "item_table").symlink_to(table_dir)
    (folder / "config.json").write_text(config.model_dump_json())


def build_untrained(folder: Path) -> NewModel:
    """The model of a world before its first step, the same at every call."""
    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    torch.manual_seed(1)
    return build_model(config.urm, ItemTable.open(folder / "item_table"), ["purchase"], CachePlace(folder))


def run_training(
    folder: Path, checkpoints: Checkpoints, report: Callable[[int, dict[str, float]], None], patience: int = 0
) -> tuple[Urm, TrainingSummary]:
    """Build the model of a world and train it, or go on from its newest checkpoint."""
    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    urm = config.urm.model_copy(update={"patience": patience})
    catalogue, contexts, examples = (pq.read_table(folder / f"{name}.parquet") for name in TABLES)
    new = build_untrained(folder)
    tasks = {task.name: task for task in config.tasks}
    training, measured = (read_examples(contexts, examples, tasks, split) for split in ("train", "validation"))
    asked = [example for _, of_context in measured for example in of_context]
    validation = Validation(asked, catalogue["item_id"].to_numpy(), new.builder, config.urm, config.evaluation.k)
    sampler = NegativeSampler(catalogue, config.urm.num_negatives, config.urm.negative_power)
    steps = TrainingSteps(training, new.builder, sampler, config)
    options = {"checkpoints": checkpoints, "device": "cpu", "seed": config.seed, "report": report}
    summary = train(new.model, steps, validation, urm, **options)
    return new.model, summary


def launch(module: str, arguments: list[Path], processes: int = 2) -> list[str]:
    """Run a module in processes connected by gloo; returns what each wrote to its standard output."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = meeting | {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    command, pipes = [sys.executable, "-m", module, *map(str, arguments)], dict.fromkeys(("stdout", "stderr"), PIPE)
    started = [
        subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | common | ranks, text=True, **pipes)
        for ranks in ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
    ]
    try:
        answers = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, answers, strict=True):
        if process.returncode != 0:
            raise RuntimeError(errors)
    return [output for output, _ in answers]


if __name__ == "__main__":
    torch.set_num_threads(1)
    world, checkpoints = map(Path, sys.argv[1:])
    run_training(world, Checkpoints(checkpoints), lambda step, metrics: print(step, metrics, flush=True))
