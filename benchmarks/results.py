"""Repeats the measurements of docs/results/, step by step, on this machine.

    python -m benchmarks.results amazon_beauty    # the rows of one data set, three seeds: about 5 hours on two cores
    python -m benchmarks.results all              # all of it: some 34 hours
    python -m benchmarks.results all --list       # the steps, and how long each takes

Finished work is reused (every stage by its fingerprint), so that a run that was stopped goes on where it stood when it
is started again. A step that fails does not stop the others; the table at the end names it, with its log.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.settings import get_settings

CONFIGS = ("complete_journey", "amazon_beauty", "amazon_sports", "amazon_toys")
WITH_PHRASES = ("complete_journey", "amazon_beauty")  # those with a file in configs/guidance
ABLATED = (("complete_journey", "urm"), ("amazon_beauty", "urm"), ("amazon_beauty", "packing"))  # with which grid
LONGER = {  # than `make demo`, which is for minutes: both models as long as it helps them on validation
    "complete_journey": (
        "features.max_test_examples=2000",
        "features.max_validation_examples=3000",
        "baseline.max_seconds=7200",
        "urm.contexts_per_batch=32",
        "urm.num_negatives=1024",
        "urm.max_steps=600",
        "urm.eval_steps=150",
        "urm.validation_contexts=1000",
        "urm.max_seconds=20000",
    )
}
SEEDS = (0, 1, 2)
STAGES = ("ingest", "validate", "features", "encode", "baseline", "sft", "evaluate", "gate")
URM = (sys.executable, "-m", "components")
SERVING = {
    "inference": 5,
    "engines": 10,
    "instances": 15,
    "backfill": 5,
    "serving": 20,
    "reads": 3,
    "index": 30,
}  # modules here, and minutes
THROUGHPUT = (sys.executable, "-m", "benchmarks.throughput")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Unique; names the log, too.
        part: Part of docs/results/ that it is for.
        command: Program and arguments.
        minutes: An estimate for two cores, where nothing is done yet; not measured.
    """

    name: str
    part: str
    command: tuple[str, ...]
    minutes: float


def plan(overrides: list[str], data: Path | None, folder: Path) -> Iterator[Step]:
    """All steps, in order.

    Args:
        overrides: KEY=VALUE for every configuration, e.g. a shorter training.
        data: Folder with the public data sets, one folder each by the name of its configuration.
        folder: Where the figures of throughput go.
    """
    for config in CONFIGS:
        yield from _headline(config, set_options(config, overrides, data), data)
    for config in WITH_PHRASES:
        options = (*_run(config, SEEDS[0]), *set_options(config, overrides, data), "--set", f"seed={SEEDS[0]}")
        yield Step(f"steering-{config}", "steering", (*URM, "steering", *options), 5)
    for config, grid in ABLATED:
        study = ("--grid", grid, "--config", config, "--run-dir", f"results-{config}-{grid}")
        options = (*study, *set_options(config, overrides, data, longer=False))
        name = f"ablation-{config}-{grid}"
        yield Step(name, "ablations", (*URM, "ablation", "run", *options), 30 if grid == "packing" else 300)
        yield Step(f"{name}-summary", "ablations", (*URM, "ablation", "summary", *options), 1)
    for config in WITH_PHRASES:
        options = (*_run(config, SEEDS[0]), *set_options(config, overrides, data))
        output = ("--output", str(folder / f"throughput-{config}.json"))
        yield Step(f"throughput-{config}", "throughput", (*THROUGHPUT, *options, *output), 5)
    yield from _serving(set_options(CONFIGS[0], overrides, data), folder)


def _headline(config: str, settings: tuple[str, ...], data: Path | None) -> Iterator[Step]:
    if config.startswith("amazon_") and data is None and not Path("data", config, "items.parquet").exists():
        yield Step(f"{config}-fetch", "headline", (*URM, "data", "fetch", config, "--to", "data"), 1)
    minutes = dict.fromkeys(STAGES, 1.0) | {"baseline": 30.0, "sft": 60.0, "evaluate": 5.0}
    for seed in SEEDS:
        for stage in STAGES:
            command = (*URM, stage, *_run(config, seed), *settings, "--set", f"seed={seed}")
            yield Step(f"{config}-seed{seed}-{stage}", "headline", command, minutes[stage])
    run_dirs = (_run(config, seed)[-1] for seed in SEEDS)
    yield Step(f"{config}-compare", "headline", (*URM, "compare", *run_dirs), 1)


def _serving(settings: tuple[str, ...], folder: Path) -> Iterator[Step]:
    """The recall runtime with the release of the default data's first seed, whatever its gate says."""
    options = (*_run(CONFIGS[0], SEEDS[0]), *settings, "--set", f"seed={SEEDS[0]}")
    yield Step("serving-release", "serving", (*URM, "release", *options, "--promote-anyway"), 1)
    for name, minutes in SERVING.items():
        output = ("--output", str(folder / f"{name}.json"))
        more = ("--work", str(folder / "indexes")) if name == "index" else ()
        yield Step(name, "serving", (sys.executable, "-m", f"benchmarks.{name}", *options, *more, *output), minutes)
    one_redis = (sys.executable, "-m", "benchmarks.one_redis", "--output", str(folder / "one_redis.jsonl"))
    yield Step("one-redis", "serving", one_redis, 15)
    knobs = ("env", "URM_FAULT_ROUNDS=200", "URM_FAULT_PAUSE_SECONDS=30")
    yield Step("faults", "serving", (*knobs, sys.executable, "-m", "pytest", "-s", "tests/faults"), 10)


def _run(config: str, seed: int) -> tuple[str, ...]:
    return ("--config", config, "--run-dir", f"results-{config}-seed{seed}")


def set_options(config: str, overrides: Iterable[str], data: Path | None, longer: bool = True) -> tuple[str, ...]:
    """Options `--set` of a headline run of a configuration (`longer`) or of an ablation; later overrides win."""
    given = [*(LONGER.get(config, ()) if longer else ()), *overrides]
    if data is not None and config.startswith("amazon_"):
        given.append(f"source.data_dir={data / config}")
    return tuple(part for override in given for part in ("--set", override))


def run_step(step: Step, logs: Path) -> bool:
    """Run one step with its output in a log of its own; tells whether it succeeded."""
    log = logs / f"{step.name}.log"
    with log.open("w") as stream:
        stream.write(shlex.join(step.command) + "\n")
        stream.flush()
        return subprocess.run(step.command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode == 0


def print_steps(steps: Sequence[Step]) -> None:
    """Print the steps with their minutes."""
    for step in steps:
        print(f"{step.part:12} {step.minutes:6g} min  {step.name}")
    minutes = sum(step.minutes for step in steps)
    print(f"{'all':12} {minutes:6g} min ({minutes / 60:.1f} hours), {len(steps)} steps")


def run_steps(steps: Sequence[Step], folder: Path) -> Iterator[tuple[Step, bool, float]]:
    """Run all steps in order, their logs in a folder; yields each with whether it succeeded and its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {step.name} (up to {step.minutes:g} min) …", end=" ", flush=True)
        start = time.monotonic()
        succeeded = run_step(step, folder)
        seconds = time.monotonic() - start
        print(f"{'done' if succeeded else 'FAILED'} in {seconds:.0f} s", flush=True)
        yield step, succeeded, seconds


def main() -> int:
    """Run the steps; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", nargs="?", default="all", choices=[*CONFIGS, "all"], help="Its headline rows alone")
    parser.add_argument("--data", type=Path, help="Folder of the public data sets; empty: as the configurations say")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="For every configuration")
    parser.add_argument("--only", default="", help="Only steps with this in their name or part")
    parser.add_argument("--list", action="store_true", help="Print the steps and estimated minutes, run none")
    arguments = parser.parse_args()
    folder = get_settings().home.absolute() / "results"
    config = arguments.data_set
    steps = [
        step
        for step in plan(arguments.set, arguments.data, folder)
        if arguments.only in f"{step.part} {step.name}"
        and (config == "all" or (step.part == "headline" and step.name.startswith(f"{config}-")))
    ]
    if arguments.list:
        print_steps(steps)
        return 0
    failed = [step.name for step, succeeded, _ in run_steps(steps, folder) if not succeeded]
    for name in failed:
        print(f"failed: {name}, see {folder / name}.log")
    compared = f"{config}-compare"
    if compared in {step.name for step in steps} - {*failed}:
        print((folder / f"{compared}.log").read_text())
    print(f"logs, with the tables that the steps print: {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
