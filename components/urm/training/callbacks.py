"""Callbacks of a training: its end, its checkpoints, its metrics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.urm.training.schedule import Budget

Report = Callable[[int, dict[str, float]], None]

COMPLETE = "budget.json"  # written into a checkpoint after everything else: a killed process may leave one without it


class KeepBudget(TrainerCallback):
    """Ends the training cleanly when time or patience runs out, marks checkpoints as complete, reports metrics."""

    def __init__(self, budget: Budget, report: Report, patience: int = 0) -> None:
        """Take the budget, a callback for metrics, and the evaluations without a better one before stopping."""
        self.budget = budget
        self.report = report
        self.patience = patience

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Let validation call `item_vectors` of a sharded model; no effect on a whole one."""
        if model is not None:
            register_fsdp_forward_method(model, "item_vectors")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """At the end, evaluate and save once more."""
        if self.budget.is_spent or state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Mark the checkpoint as complete, and stop if patience has run out."""
        if state.is_world_process_zero:
            self.budget.save(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / COMPLETE)
        # The state is part of the checkpoint, so a resumed training stops where an uninterrupted one does.
        since_best = state.global_step - (state.best_global_step or 0)
        if self.patience and since_best >= self.patience * state.eval_steps:
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
        """Report what the Trainer logs, once for all processes."""
        if not state.is_world_process_zero:
            return
        metrics = {name.replace("eval_", "validation_"): float(value) for name, value in (logs or {}).items()}
        metrics.pop("epoch", None)
        self.report(state.global_step, metrics)
