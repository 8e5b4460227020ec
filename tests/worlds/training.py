"""One training of the tiny world, in a test or in processes of its own.

Always on the CPU: its tests compare weights bit for bit, and several processes cannot share a GPU.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
import structlog
import torch

from components.caches import CachePlace
from components.config import RunConfig
from components.exceptions import StoppedError
from components.items.table import ItemTable
from components.urm.data.examples import Groups
from components.urm.network.build import NewModel, build_model
from components.urm.network.model import Urm
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.steps import NegativeSampler, TrainingSteps
from components.urm.training.train import TrainingSummary, train
from components.urm.training.validation import Validation
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
    prompts = [task.prompt for task in config.tasks]
    return build_model(config.urm, ItemTable.open(folder / "item_table"), ["purchase"], CachePlace(folder), prompts)


def run_training(
    folder: Path,
    checkpoints: Checkpoints,
    report: Callable[[int, dict[str, float]], None],
    patience: int = 0,
    sharded: bool = False,
) -> tuple[Urm, TrainingSummary]:
    """Build the model of a world and train it, or go on from its newest checkpoint."""
    config = RunConfig.model_validate_json((folder / "config.json").read_text())
    urm = config.urm.model_copy(update={"patience": patience})
    catalogue, contexts, examples = (pq.read_table(folder / f"{name}.parquet") for name in TABLES)
    new = build_untrained(folder)
    tasks = {task.name: task for task in config.tasks}
    training, measured = (Groups(contexts, examples, tasks, split) for split in ("train", "validation"))
    asked = [example for _, of_context in measured for example in of_context]
    validation = Validation(asked, catalogue["item_id"].to_numpy(), new.builder, config.urm, config.evaluation.k)
    sampler = NegativeSampler(catalogue, config.urm.num_negatives, config.urm.negative_power)
    steps = TrainingSteps(training, new.builder, sampler, config)
    options = {"checkpoints": checkpoints, "device": "cpu", "seed": config.seed, "report": report}
    summary = train(new.model, steps, validation, urm, **options, sharded=sharded)
    return new.model, summary


def launch(module: str, arguments: list[object], processes: int = 2, machines: bool = False) -> list[str]:
    """Run a module's `main` in processes connected by gloo; returns what each wrote to its standard output.

    They are forks of one process that has imported everything. With `machines`, each believes that it is alone on its
    machine.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.worlds.training", "tests.worlds.sharded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read once, when the common process imports torch
        forkserver.ensure_running()
    with TemporaryDirectory() as name:
        folder = Path(name)
        started = []
        for rank in range(processes):
            place = common | {"RANK": str(rank), "LOCAL_RANK": "0" if machines else str(rank)}
            given = (module, [*map(str, arguments)], place, folder / f"{rank}.out", folder / f"{rank}.err")
            started.append(context.Process(target=_run, args=given))
            started[-1].start()
        try:
            deadline = time.monotonic() + 240
            for process in started:
                process.join(deadline - time.monotonic())
        finally:
            for process in started:
                process.kill()
                process.join()
        for rank, process in enumerate(started):
            if process.exitcode != 0:
                raise RuntimeError(f"exit code {process.exitcode}: {(folder / f'{rank}.err').read_text()}")
        return [(folder / f"{rank}.out").read_text() for rank in range(processes)]


def _run(module: str, arguments: list[str], place: dict[str, str], out: Path, err: Path) -> None:
    os.environ.update(place)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    torch.set_num_threads(1)
    importlib.import_module(module).main(*arguments)


def main(world: str, folder: str, store: str = "", sharded: str = "", last_step: str = "0", float32: str = "") -> None:
    """Train; with a store, each process in a folder of its own, and the last one gets SIGTERM at a step if asked."""
    if float32:  # on every machine: how far sums in another order differ in bfloat16 is the processor's matter
        torch.cpu.get_capabilities = dict
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    rank = int(os.environ["RANK"])

    def report(step: int, metrics: dict[str, float]) -> None:
        print(json.dumps([step, metrics]), flush=True)
        if step == int(last_step):
            os.kill(os.getpid(), signal.SIGTERM)

    own = Path(folder) / str(rank) if store else Path(folder)
    try:
        model, summary = run_training(Path(world), Checkpoints(own, store), report, sharded=bool(sharded))
    except StoppedError as error:
        print(json.dumps(str(error)))
        return
    if rank == 0:
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        print(json.dumps(summary.best_step))
