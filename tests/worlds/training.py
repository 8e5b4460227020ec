"""One training of the tiny world, callable from a test or as a process: `python -m tests.worlds.training`.

Always on the CPU: its tests compare weights bit for bit, and several processes cannot share a GPU.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pyarrow.parquet as pq
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
    """Run a module in processes connected by gloo; returns what each wrote to its standard output.

    With `machines`, each believes that it is alone on its machine.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = meeting | {"WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    command, pipes = [sys.executable, "-m", module, *map(str, arguments)], dict.fromkeys(("stdout", "stderr"), PIPE)
    started = [
        subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | common | ranks, text=True, **pipes)
        for ranks in ({"RANK": str(rank), "LOCAL_RANK": "0" if machines else str(rank)} for rank in range(processes))
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


def main(
    world: Path, folder: Path, store: str = "", sharded: str = "", last_step: str = "0", float32: str = ""
) -> None:
    """Train; with a store, each process in a folder of its own, and the last one gets SIGTERM at a step if asked."""
    if float32:  # on every machine: how far sums in another order differ in bfloat16 is the processor's matter
        torch.cpu._is_avx512_bf16_supported = lambda: False
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    rank = int(os.environ["RANK"])

    def report(step: int, metrics: dict[str, float]) -> None:
        print(json.dumps([step, metrics]), flush=True)
        if step == int(last_step):
            os.kill(os.getpid(), signal.SIGTERM)

    own = folder / str(rank) if store else folder
    try:
        model, summary = run_training(world, Checkpoints(own, store), report, sharded=bool(sharded))
    except StoppedError as error:
        print(json.dumps(str(error)))
        return
    if rank == 0:
        torch.save(model.state_dict(), folder / "model.pt")
        print(json.dumps(summary.best_step))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
