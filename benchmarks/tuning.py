"""Seeded random search over the settings of one trained rival, on validation alone.

    python -m benchmarks.tuning --config amazon_beauty --run-dir default --model target_attention --output ta.jsonl

needs the stages ingest, validate, features and encode of the run. Trial 0 has the settings of the configuration, the
others are drawn from SPACES by the seed and their number, so that a trial is the same whenever it is run. `--set`
changes what all trials share, e.g. `--set baseline.id_vectors=true`. For successive halving, make many trials short and
train the best of them for longer:

    … --trials 12 --epochs 1 --output short.jsonl
    … --trials 4 --epochs 4 --output long.jsonl --best-of short.jsonl

Each trial is one JSON line, appended once it is done: stopped, the search goes on with the trials that the file
lacks. Test examples are never ranked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import find_run, parse_run
from benchmarks.lines import append_line, read_lines
from components.baseline.data import Dataset, load_dataset
from components.baseline.models import ItemTables, train_sequences, train_target_attention
from components.baseline.text import read_text_features
from components.baseline.training import TrainingSummary
from components.caches import CachePlace
from components.config import RunConfig
from components.device import set_threads
from components.exceptions import DataError
from components.settings import Settings, get_settings
from components.storage import require_result
from components.studies.finished import FinishedRun

Space = Mapping[str, Sequence[Any]]  # setting → values that are equally likely; fields of the section `baseline`

ATTENTION: Space = {
    "dimension": (32, 64, 128),
    "hidden": (32, 64),
    "learning_rate": (3e-3, 5e-3, 1e-2, 2e-2),
    "dropout": (0.0, 0.1, 0.2, 0.3),
    "id_dropout": (0.1, 0.2, 0.4, 0.6),
    "weight_decay": (0.0, 0.03, 0.1, 0.3, 1.0),
    "num_negatives": (512, 1024, 2048),
    "negative_power": (0.5, 0.75, 1.0),
}
SPACES: Mapping[str, Space] = {
    "target_attention": ATTENTION,
    "target_attention_text": {**ATTENTION, "text_hidden": (0, 128, 256)},
    "sasrec": {
        "sasrec.dimension": (64, 128, 256),
        "sasrec.num_layers": (1, 2),
        "sasrec.num_heads": (1, 2),
        "sasrec.dropout": (0.2, 0.3, 0.4, 0.5, 0.6),
        "sasrec.learning_rate": (1e-3, 2e-3, 3e-3),
        "sasrec.weight_decay": (0.0, 0.01, 0.1),
        "sasrec.num_negatives": (512, 1024, 4096),
        "sasrec.negative_power": (0.5, 0.75, 1.0),
        "sasrec.max_epochs": (40, 80),
    },
}

Train = Callable[[RunConfig], TrainingSummary]


def draw_settings(space: Space, seed: int, trial: int) -> dict[str, Any]:
    """The settings of a trial; none for the first, which leaves those of the configuration."""
    if trial == 0:
        return {}
    random = np.random.default_rng([seed, trial])
    return {name: values[int(random.integers(len(values)))] for name, values in space.items()}


def with_settings(
    config: RunConfig, settings: Mapping[str, Any], model: str, seconds: float, epochs: int | None = None
) -> RunConfig:
    """The configuration with these settings, the time limit of a trial and, if given, its number of epochs.

    Raises:
        ValidationError: A setting is out of range.
    """
    content = config.model_dump()
    section = "sasrec." if model == "sasrec" else ""
    limits = {f"{section}max_seconds": seconds} | ({f"{section}max_epochs": epochs} if epochs else {})
    for name, value in {**settings, **limits}.items():
        section, (*folders, field) = content["baseline"], name.split(".")
        for folder in folders:
            section = section[folder]
        section[field] = value
    return RunConfig.model_validate(content)


def name_data(run: FinishedRun, config: RunConfig) -> dict[str, Any]:
    """What the examples and vectors of a search's trials are: the run's seed and the fingerprints of its stages."""
    stages = {stage: require_result(run.run_dir, stage).fingerprint for stage in ("features", "encode")}
    return {"run_seed": config.seed, "data": stages}


def open_trainer(model: str, config: RunConfig, run: FinishedRun, settings: Settings) -> Train:
    """Read what all trials share; returns what trains the model by a configuration."""
    tables = ItemTables(run.path("encode", "item_table"), run.path("encode", "item_table_past"))
    catalogue, contexts, examples = (run.path("features", name) for name in ("catalogue", "contexts", "examples"))
    data: Dataset = load_dataset(catalogue, run.path("validate", "items"), tables.now, contexts, examples, config.tasks)
    if model == "sasrec":
        return lambda trial: train_sequences(data, trial, _log)[1]
    text = None
    if model == "target_attention_text":
        text = read_text_features(data, tables.now, config.items, CachePlace.of(settings) / "vectors")
    return lambda trial: train_target_attention(data, trial, tables, text, _log)[1]


def search(
    model: str,
    config: RunConfig,
    train: Train,
    output: Path,
    *,
    data: Mapping[str, Any],
    seed: int,
    num_trials: int,
    seconds: float,
    epochs: int | None = None,
    best_of: Path | None = None,
) -> list[dict[str, Any]]:
    """Run the trials that the file lacks: the first of the seed, or the best of another search on the same `data`.

    Returns:
        All trials of this search in the file, the best mean validation recall first.

    Raises:
        DataError: The file is of another search.
    """
    shared: dict[str, Any] = {"model": model, "config": config.name, "seed": seed, **data}
    shared |= {"base": config.baseline.model_dump(mode="json"), "k": config.evaluation.k}
    wanted = {trial: draw_settings(SPACES[model], seed, trial) for trial in range(num_trials)}
    if best_of:
        earlier = sorted(read_trials(best_of, shared), key=_worst_last)
        wanted = {done["trial"]: done["settings"] for done in earlier[:num_trials]}
    shared |= {"seconds_limit": seconds, "epochs": epochs}
    trials = read_trials(output, shared)
    for trial in sorted(set(wanted) - {done["trial"] for done in trials}):
        settings = wanted[trial]
        summary = asdict(train(with_settings(config, settings, model, seconds, epochs)))
        recall = summary.pop("best_recall")
        trials.append(shared | {"trial": trial, "settings": settings, "validation_recall": recall} | summary)
        append_line(output, trials[-1])
        print(f"trial {trial}: {recall['mean']:.4f} {json.dumps(settings)}", flush=True)
    return sorted(trials, key=_worst_last)


def _worst_last(trial: Mapping[str, Any]) -> float:
    return -float(trial["validation_recall"]["mean"])


def read_trials(output: Path, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Trials of the file.

    Raises:
        DataError: A line is of another search.
    """
    trials = read_lines(output)
    wanted = json.loads(json.dumps(shared))
    for done in trials:
        different = [name for name, value in wanted.items() if done.get(name) != value]
        if different:
            raise DataError(
                f"file {output}",
                expected=f"trials of one search, {different[0]} {wanted[different[0]]!r}",
                got=repr(done.get(different[0])),
                remedy="name another --output",
            )
    return trials


def _log(step: int, metrics: dict[str, float]) -> None:
    if "validation_recall.mean" in metrics:
        print(f"  step {step}: {metrics['validation_recall.mean']:.4f}", file=sys.stderr, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parse_run(__doc__)
    parser.add_argument("--model", choices=sorted(SPACES), required=True)
    parser.add_argument("--trials", type=int, default=12, help="Number of trials in all")
    parser.add_argument("--seconds", type=float, default=900, help="Training time limit of a trial")
    parser.add_argument("--epochs", type=int, help="Of every trial; without, as configured or drawn")
    parser.add_argument("--best-of", type=Path, help="Trials of an earlier search, the best of which are run")
    parser.add_argument("--seed", type=int, default=0, help="Of the settings drawn; the run's own seed trains")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, and print the best trial."""
    options, settings = parse_arguments(arguments), get_settings()
    set_threads(settings)
    config, run = find_run(options, settings)
    train = open_trainer(options.model, config, run, settings)
    trials = search(
        options.model, config, train, options.output,
        data=name_data(run, config), seed=options.seed, num_trials=options.trials, seconds=options.seconds,
        epochs=options.epochs, best_of=options.best_of,
    )  # fmt: skip
    print(json.dumps(trials[0], indent=2))


if __name__ == "__main__":
    main()
