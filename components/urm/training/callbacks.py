"""Callbacks of a training: its end, its checkpoints, its metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.urm.training.schedule import Budget

Report = Callable[[int, dict[str, float]], None]


@dataclass
class Wishes:
    """What all processes have agreed on after a step."""

    save: bool = False  # the interval between checkpoints is over
    stop: bool = False  # one of them got SIGTERM


def count_since_best(state: TrainerState) -> int:
    """Evaluations after the best one. The log of the state is part of each checkpoint, and tells of lost ones, too."""
    recalls = [entry["eval_recall"] for entry in state.log_history if "eval_recall" in entry]
    return len(recalls) - 1 - recalls.index(max(recalls)) if recalls else 0


class KeepBudget(TrainerCallback):
    """Ends the training cleanly when time or patience runs out or on SIGTERM, saves in between, reports metrics."""

    def __init__(self, budget: Budget, wishes: Wishes, report: Report, patience: int = 0) -> None:
        """Take a callback for metrics, and the evaluations without a better one before stopping."""
        self.budget = budget
        self.wishes = wishes
        self.report = report
        self.patience = patience

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save when it is due; at the end, evaluate and save once more."""
        control.should_save |= self.wishes.save or self.wishes.stop
        control.should_training_stop |= self.wishes.stop
        if self.budget.is_spent or state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Stop if patience has run out."""
        # Saves between evaluations change nothing: patience runs out at an evaluated step.
        if self.patience and count_since_best(state) >= self.patience:
            control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Report what the Trainer logs, once for all processes, but for its summary: that is of this attempt alone."""
        if not state.is_world_process_zero or "train_runtime" in (logs or {}):
            return
        metrics = {name.replace("eval_", "validation_"): float(value) for name, value in (logs or {}).items()}
        metrics.pop("epoch", None)
        self.report(state.global_step, metrics)
