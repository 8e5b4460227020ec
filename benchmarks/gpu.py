"""Everything that waits for a GPU, in at most 40 minutes of one, and one report of it: `make gpu`.

    python -m benchmarks.gpu --prepare --data FOLDER   # before a GPU is rented: an hour or two of CPU
    python -m benchmarks.gpu --data FOLDER             # with the GPU
    python -m benchmarks.gpu --tiny                    # a rehearsal: the same steps with tiny sizes, also on a CPU

On the GPU: the tests of what touches a device; SFT of the whole depth of the backbone, from pretrained and from random
weights, evaluated; with the first of these models the speed of training, of inference and of several instances, with
and without NVIDIA MPS. Each step has a time limit. The preparation (the stages up to `baseline`) comes first where it
has not been done. Without `--data`, the folder of the public data sets, only the default data are trained on.

The report is written after every step. A step that succeeded is not repeated at the same commit, so that a run that was
stopped goes on. One that failed does not stop the others and is tried again by the next run; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import mlflow
import pandas as pd
import torch

from benchmarks.bench import query_gpu, write_figures
from benchmarks.instances import MPS
from benchmarks.records import DATA_SETS, FOLDER, find_tuned_seeds
from benchmarks.results import CONFIGS, URM, Step, print_steps, run_steps, set_options
from components.addresses import join, read_json
from components.device import choose_device
from components.evaluation.bootstrap import compare
from components.evaluation.report import markdown
from components.evaluation.summary import BASELINE, CANDIDATE
from components.schemas.hits import read_hits
from components.settings import Settings, get_settings
from components.storage import StageResult, load_result

WEIGHTS = {"pretrained": "true", "random": "false"}  # value of urm.pretrained
PREPARED = {"ingest": 1.0, "validate": 1.0, "features": 2.0, "encode": 5.0, "baseline": 45.0}  # estimates in minutes
FULL = ("urm.num_layers=30", "urm.max_seconds=165")
TINY = (
    "features.max_train_contexts=300", "features.max_validation_examples=10", "features.max_test_examples=10",
    "items.id_max_steps=20", "baseline.models=[]", "baseline.max_seconds=5", "urm.num_layers=1", "urm.max_steps=6",
    "urm.eval_steps=3", "urm.validation_contexts=4", "urm.contexts_per_batch=2", "urm.num_negatives=64",
    "evaluation.bootstrap_samples=400",
)  # fmt: skip
COMPONENTS = Path("tests/components")
TESTS = (
    "test_device.py", "urm", "items/test_text.py", "items/test_image.py", "stages/test_encode.py",
    "stages/test_sft.py", "stages/test_evaluate.py", "stages/test_release.py", "studies/test_steering.py",
    "recall/serving", "recall/worker", "recall/process/test_supervisor.py",
)  # fmt: skip
SIZES = {  # of a measurement: in earnest, tiny
    "throughput": ("--steps 20", "--steps 5"),
    "inference": ("--users 256 --naive-users 4 --repeats 3", "--users 4 --naive-users 2 --repeats 1"),
    "instances": ("--instances 1 2 4 --users 128 --repeats 2 --seconds 5",
                  "--instances 1 2 --users 8 --repeats 1 --seconds 1"),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What to run, and where it is found afterwards.

    Attributes:
        folder: Where figures, logs and the report go.
        device: Of the tests, which take no `auto`.
        overrides: KEY=VALUE for every configuration.
        data: Folder with the public data sets; none leaves Amazon Beauty out.
        tiny: Whether sizes are tiny.
    """

    folder: Path
    device: str
    overrides: Sequence[str] = ()
    data: Path | None = None
    tiny: bool = False

    @property
    def configs(self) -> Sequence[str]:
        """The data sets."""
        return CONFIGS[: 2 if self.data else 1]

    def run_name(self, config: str, weights: str) -> str:
        """Name of a run directory."""
        return f"{self.folder.name}-{config}-{weights}"

    def steps(self) -> Iterator[Step]:
        """All steps, in order."""
        runs = {(config, weights): self._options(config, weights) for config in self.configs for weights in WEIGHTS}
        for (config, weights), options in runs.items():
            for stage, minutes in PREPARED.items():  # the second run reuses the first one's work
                estimate = minutes if weights == "pretrained" else 0.2
                yield Step(f"{config}-{weights}-{stage}", "preparation", (*URM, stage, *options), estimate)
        paths = [str(COMPONENTS / name) for name in (TESTS[:1] if self.tiny else TESTS)]
        pytest = (sys.executable, "-m", "pytest", "-q", "-W", "default", f"--junit-xml={self.folder / 'tests.xml'}")
        yield _limit("tests", ("env", f"URM_DEVICE={self.device}", *pytest, *paths), 5)
        for number, ((config, weights), options) in enumerate(runs.items()):
            yield _limit(f"{config}-{weights}-sft", (*URM, "sft", *options), 3.75)
            yield _limit(f"{config}-{weights}-evaluate", (*URM, "evaluate", *options), 4 if "amazon" in config else 1.5)
            if number == 0:
                yield from self._speed(options)

    def _speed(self, options: Sequence[str]) -> Iterator[Step]:
        """Speed of a trained run, and of its release, whatever its gate says."""
        yield _limit("gate", (*URM, "gate", *options), 0.5)
        yield _limit("release", (*URM, "release", *options, "--promote-anyway"), 1)
        for name, minutes in {"throughput": 2, "inference": 1.5, "instances": 2, "instances-mps": 2}.items():
            module, _, mps = name.partition("-")
            size = (*SIZES[module][self.tiny].split(), *(["--mps"] if mps else []))
            command = (sys.executable, "-m", f"benchmarks.{module}", *options, *size)
            if not mps or shutil.which(MPS):
                yield _limit(name, (*command, "--output", str(self.folder / f"{name}.json")), minutes)

    def _options(self, config: str, weights: str) -> tuple[str, ...]:
        given = [*(TINY if self.tiny else FULL), f"urm.pretrained={WEIGHTS[weights]}", *self.overrides]
        run = ("--config", config, "--run-dir", self.run_name(config, weights))
        return (*run, *set_options(config, given, self.data))


def _limit(name: str, command: Sequence[str], minutes: float) -> Step:
    """A step of the GPU that is interrupted after so many minutes, and killed if it does not end then."""
    limit = ("timeout", "--foreground", "--signal=INT", "--kill-after=20", f"{60 * minutes:.0f}")
    return Step(name, "gpu", (*limit, *command), minutes)


def render(plan: Plan, settings: Settings, done: Mapping[str, Mapping[str, Any]]) -> str:
    """The report in Markdown, of whatever is there so far; `done` is what `main` keeps of each step."""
    speeds = {name: read_json(str(plan.folder / f"{name}.json")) for name in ("throughput", "inference")}
    instances = {name: read_json(str(plan.folder / f"{name}.json")) for name in ("instances", "instances-mps")}
    sections: dict[str, Callable[[], str]] = {
        "Machine": lambda: _machine(plan, done),
        "Steps": lambda: _steps(plan, done),
        "Tests": lambda: _tests(plan.folder / "tests.xml"),
        "Full-depth SFT": lambda: _trainings(plan, settings),
        **{f"Recall, {DATA_SETS[config]}": partial(_recalls, plan, config, settings) for config in plan.configs},
        **{f"Speed: {name}": partial(_figures, figures) for name, figures in speeds.items() if figures},
        **{f"Speed: {name}": partial(_rows, rows) for name, rows in instances.items() if rows},
    }
    parts = ["# GPU report" + (", tiny: a rehearsal whose figures mean nothing" if plan.tiny else "")]
    for title, section in sections.items():
        try:
            text = section()
        except Exception as error:  # of a file of another version, say: the steps that are left must run
            text = f"**This section failed: {error!r}**"
        parts += [f"## {title}", text] if text else []
    return "\n\n".join(parts) + "\n"


def _machine(plan: Plan, done: Mapping[str, Mapping[str, Any]]) -> str:
    noted = {name: ", ".join(sorted({step[name] for step in done.values()})) for name in ("date", "commit")}
    rows = noted | {
        "device": plan.device,
        "GPU, driver, memory": query_gpu("name,driver_version,memory.total") or "none",
        "torch, CUDA": f"{torch.__version__}, {torch.version.cuda or 'none'}",
        "CPU cores": len(os.sched_getaffinity(0)),
        "NVIDIA MPS": "yes" if shutil.which(MPS) else f"none: no command `{MPS}`",
        "settings": ", ".join((*(("tiny ones",) if plan.tiny else FULL), *plan.overrides)),
    }
    return _figures(rows)


def _steps(plan: Plan, done: Mapping[str, Mapping[str, Any]]) -> str:
    """What failed, and how long every step took."""
    steps = list(plan.steps())
    lines = [f"**Failed: {step.name}**, see `{plan.folder / step.name}.log`." for step in steps
             if step.name in done and not done[step.name]["succeeded"]]  # fmt: skip
    lines += [] if plan.data else ["Amazon Beauty is left out: no `--data`."]
    minutes = {part: sum(done[step.name]["seconds"] for step in steps if step.part == part and step.name in done) / 60
               for part in ("preparation", "gpu")}  # fmt: skip
    lines += [f"Minutes: {_text(minutes)}."]
    rows = []
    for step in steps:
        note = done.get(step.name)
        ended = ("done" if note["succeeded"] else "**failed**") if note else "not run yet"
        rows.append(
            {"step": step.name, "part": step.part, "result": ended, "seconds": note["seconds"] if note else "–"}
        )
    return "\n".join(f"- {line}" for line in lines) + "\n\n" + _rows(rows)


def _tests(path: Path) -> str:
    if not path.exists():
        return ""
    outcomes = defaultdict(list)
    for case in ElementTree.parse(path).iter("testcase"):  # noqa: S314  # our own pytest wrote it
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    counts = ", ".join(f"{len(outcomes[name])} {name}" for name in ("passed", "failure", "error", "skipped"))
    return "\n".join([f"- {counts}.", *(f"- {name}" for name in outcomes["failure"] + outcomes["error"])])


def _trainings(plan: Plan, settings: Settings) -> str:
    rows = []
    for config, weights in itertools.product(plan.configs, WEIGHTS):
        run_dir = settings.find_run_dir(plan.run_name(config, weights))
        if result := load_result(run_dir, "sft"):
            run = {"SFT": f"{DATA_SETS[config]}, {weights}"}
            rows.append(run | result.metrics["training"] | _curves(run_dir, settings))
    return _rows(rows)


def _curves(run_dir: str, settings: Settings) -> dict[str, float]:
    """Median of what MLflow has of a training's speed and peak memory; nothing where another run trained."""
    client, note = mlflow.MlflowClient(settings.tracking_uri), read_json(join(run_dir, "tracking.json"))
    trained = f"tags.`mlflow.parentRunId` = '{note['run_id']}' and tags.`urm.stage` = 'sft'"
    curves = {}
    for run in client.search_runs([note["experiment_id"]], trained, max_results=1):
        for name in ("examples_per_second", "peak_memory_gib", "peak_device_memory_gib"):
            if name in run.data.metrics:
                curves[name] = median(point.value for point in client.get_metric_history(run.info.run_id, name))
    return curves


def _recalls(plan: Plan, config: str, settings: Settings) -> str:
    """Recall per task beside the kept headline runs, and what pretraining is worth."""
    kept = [load_result(str(FOLDER / f"{config}-tuned-seed{seed}"), "evaluate") for seed in find_tuned_seeds(config)]
    found = {w: load_result(settings.find_run_dir(plan.run_name(config, w)), "evaluate") for w in WEIGHTS}
    runs = {weights: run for weights, run in found.items() if run}
    columns = {"target attention, headline": _by_task(kept, BASELINE), "URM, headline": _by_task(kept, CANDIDATE)}
    columns |= {f"URM, {weights}": _by_task([run], CANDIDATE) for weights, run in runs.items()}
    parts = [_rows([{"task": task, **row} for task, row in pd.DataFrame(columns).iterrows()])] if runs else []
    if len(runs) == len(WEIGHTS):
        k = runs["random"].metrics["k"]
        hits = [read_hits(run.outputs["hits"], k, [CANDIDATE]).assign(model=name) for name, run in runs.items()]
        paired = compare(pd.concat(hits), *WEIGHTS, k=k, draws=2000, seed=0)
        low, high = paired.difference_interval(0.95)
        parts.append(f"Pretrained minus random: {paired.mean_difference:+.4f} (95 % {low:+.4f} … {high:+.4f}).")
    return "\n\n".join(parts)


def _by_task(runs: Sequence[StageResult | None], model: str) -> pd.Series[float]:
    """Mean recall over runs, per task and over the tasks."""
    recalls = pd.DataFrame([{task: row["recall"][model] for task, row in run.metrics["tasks"].items()}
                            for run in runs if run]).mean()  # fmt: skip
    return pd.concat([recalls, pd.Series({"mean": recalls.mean()})])


def _figures(figures: Mapping[str, Any]) -> str:
    return markdown(["", ""], [[name.replace("_", " "), _text(value)] for name, value in figures.items()])


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return markdown([name.replace("_", " ") for name in names],
                    [[_text(row.get(name, "–")) for name in names] for row in rows]) if rows else ""  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " … ".join(map(_text, value))
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") if isinstance(value, float) else str(value)


def main() -> int:
    """Run the steps; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="Only the preparation")
    parser.add_argument("--tiny", action="store_true", help="Tiny sizes, also on a CPU")
    parser.add_argument("--data", type=Path, help="Folder of the public data sets; empty: without Amazon Beauty")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="For every configuration")
    parser.add_argument("--list", action="store_true", help="Print the steps and their minutes, run none")
    arguments = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several GPUs the Trainer would use all
    settings = get_settings()
    device = choose_device(settings)
    folder = settings.home.absolute() / ("gpu-tiny" if arguments.tiny else "gpu")
    plan = Plan(folder, device, arguments.set, arguments.data, arguments.tiny)
    steps = [step for step in plan.steps() if step.part == "preparation" or not arguments.prepare]
    if arguments.list:
        print_steps(steps)
        return 0
    if device == "cpu" and not (arguments.tiny or arguments.prepare):
        parser.error("device: expected a CUDA device, got none; run it with --prepare or --tiny, or where a GPU is")
    done: dict[str, dict[str, Any]] = read_json(str(folder / "steps.json")) or {}
    for step, succeeded, seconds in run_steps([step for step in steps if not _is_done(step, done)], folder):
        done[step.name] = {
            "command": shlex.join(step.command), "commit": _commit(), "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "succeeded": succeeded, "seconds": seconds,
        }  # fmt: skip
        write_figures(folder / "steps.json", done)
        (folder / "report.md").write_text(render(plan, settings, done))
    (folder / "report.md").write_text(render(plan, settings, done))
    print(f"report: {folder / 'report.md'}")
    return 0 if all(done[step.name]["succeeded"] for step in steps) else 1


def _is_done(step: Step, done: Mapping[str, Mapping[str, Any]]) -> bool:
    known = done.get(step.name, {})
    asked = {"command": shlex.join(step.command), "commit": _commit(), "succeeded": True}
    return asked.items() <= known.items()


@cache
def _commit() -> str:
    command = ("git", "describe", "--always", "--dirty")
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
