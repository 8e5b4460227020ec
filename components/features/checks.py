"""Mistakes of the configuration or the log that show up in the features stage, each refused with one sentence."""

from collections.abc import Sequence

import ibis.expr.types as ir
from ibis import _

from components.config import SPLITS, FeaturesConfig, RunConfig, SplitConfig, Task
from components.exceptions import ConfigError, DataError
from components.features.log import attribute_column


def require_catalogue(catalogue: ir.Table, features: FeaturesConfig) -> None:
    """Refuse a catalogue without items.

    Raises:
        DataError: No item has enough training events.
    """
    if catalogue.count().execute() == 0:
        raise DataError(
            f"catalogue of items with {features.min_item_events} or more events before "
            f"{features.split.validation_start:%Y-%m-%d}",
            expected="at least one item",
            got="none",
            remedy="lower features.min_item_events or move features.split to the dates of the log",
        )


def require_tasks_in_log(log: ir.Table, tasks: Sequence[Task]) -> None:
    """Refuse filters that name a behaviour, scenario or attribute value that no event has.

    Raises:
        ConfigError: A task does so.
    """
    for field, column in (("behaviors", "behavior"), ("scenarios", "scenario")):
        known = _values(log, column)
        for task in tasks:
            for value in getattr(task.target, field):
                _require_known(task, f"target.{field}", value, known)
    for task in tasks:
        for name, value in task.target.attributes.items():
            _require_known(task, f"target.attributes.{name}", value, _values(log, attribute_column(name)))


def require_covered_windows(log: ir.Table, split: SplitConfig) -> None:
    """Refuse dates whose last window the log does not half cover: its targets would be what came in so far.

    Leave-one-out has no dates of its own.

    Raises:
        DataError: The log ends before the middle of the last window.
    """
    cut = split.cuts()[-1][0]
    newest = log.ts.max().execute()
    if split.kind == "temporal" and newest < cut + split.window / 2:
        raise DataError(
            f"the last window of features.split, from {cut:%Y-%m-%d %H:%M} to {cut + split.window:%Y-%m-%d %H:%M}",
            expected="a log that reaches beyond its middle",
            got=f"one that ends at {newest:%Y-%m-%d %H:%M}",
            remedy="move features.split.end back to where the log ends",
        )


def count_examples(examples: ir.Table, log: ir.Table, config: RunConfig) -> dict[str, dict[str, int]]:
    """Examples per task and split.

    Raises:
        DataError: A task has none in a split, other than one with held-out queries in training.
    """
    counted = examples.group_by("task", "split").agg(examples=_.count()).execute()
    counts = {task.name: dict.fromkeys(SPLITS, 0) for task in config.tasks}
    for row in counted.itertuples():
        counts[row.task][row.split] = int(row.examples)
    needed = [(task.name, split) for task in config.tasks for split in SPLITS if task.trains or split != "train"]
    empty = [(task, split) for task, split in needed if counts[task][split] == 0]
    if empty:
        task, split = empty[0]
        first, last = log.aggregate(first=_.ts.min(), last=_.ts.max()).execute().iloc[0]
        raise DataError(
            f"task {task!r}, split {split!r}",
            expected="at least one example",
            got=f"none in a log from {first:%Y-%m-%d} to {last:%Y-%m-%d}",
            remedy="move features.split to the dates of the log, widen the task's target or leave the task out",
        )
    return counts


def _values(log: ir.Table, column: str) -> list[str]:
    """Distinct values, most frequent first, as far as a message can show them all."""
    return [str(value) for value in log[column].value_counts(name="n").order_by(_.n.desc()).execute()[column].dropna()]


def _require_known(task: Task, field: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"task {task.name!r}, field {field}",
            expected="a value of the log, one of " + ", ".join(known[:10]) if known else "an attribute of the events",
            got=repr(value),
            remedy="correct the task's YAML or the source's column map",
        )
