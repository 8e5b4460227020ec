"""SFT by the Hugging Face Trainer: two learning rates, checkpoints, resume, best checkpoint by validation recall."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from components.config import UrmConfig
from components.urm.device import mixed_precision
from components.urm.loss import sampled_nce, text_loss
from components.urm.model import Batch, Urm, UrmOutput
from components.urm.schedule import Budget
from components.urm.validation import Validation

log = structlog.get_logger()
Report = Callable[[int, dict[str, float]], None]

WEIGHT_DECAY = 0.01
MAX_GRADIENT_NORM = 1.0
LOG_STEPS = 10
KEPT_CHECKPOINTS = 2  # the best and the last
COMPLETE = "budget.json"  # written into a checkpoint after everything else: a kill may leave one without it


@dataclass(frozen=True)
class TrainingSummary:
    """What a training came to.

    Attributes:
        steps: Steps done.
        seconds: Time spent, evaluations included.
        best_step: Step of the weights kept.
        best_recall: Their validation recall, mean over tasks.
        stopped_by: "steps" or "time".
    """

    steps: int
    seconds: float
    best_step: int
    best_recall: float
    stopped_by: str


def train(
    model: Urm,
    steps: Dataset[Batch],
    validation: Validation,
    config: UrmConfig,
    *,
    scratch: Path,
    device: str,
    seed: int,
    report: Report,
) -> TrainingSummary:
    """Train in place and leave the weights of the best evaluation in the model.

    Args:
        model: The model.
        steps: Item s is the batch of step s.
        validation: Measures the recall that decides.
        config: Section `urm`.
        scratch: Folder of the checkpoints; a complete one found there is resumed.
        device: "cpu" or "cuda".
        seed: Of dropout and the like; batches have their own.
        report: Called with a step and its metrics whenever there are new ones.
    """
    budget = Budget(config.max_steps, config.max_seconds)
    trainer = UrmTrainer(
        model=model,
        args=_arguments(config, scratch, device, seed),
        train_dataset=steps,
        eval_dataset=validation,  # never indexed: evaluate() below measures it whole
        data_collator=_only,
        callbacks=[_KeepBudget(budget, report)],
        config=config,
        validation=validation,
        budget=budget,
    )
    trainer.remove_callback(PrinterCallback)  # `report` says the same, once
    checkpoint = last_checkpoint(scratch)
    if checkpoint is not None:
        budget.resume(checkpoint / COMPLETE)
        log.info("resuming", checkpoint=checkpoint.name, seconds=round(budget.seconds, 1))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    return TrainingSummary(
        steps=state.global_step,
        seconds=round(budget.seconds, 1),
        best_step=state.best_global_step or state.global_step,
        best_recall=float(state.best_metric or 0.0),
        stopped_by="steps" if state.global_step >= config.max_steps else "time",
    )


def last_checkpoint(scratch: Path) -> Path | None:
    """The newest complete checkpoint of a folder, or None."""
    complete = [path.parent for path in scratch.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


class UrmTrainer(Trainer):
    """The Trainer with URM's loss, its parameter groups and its evaluation."""

    def __init__(self, *, config: UrmConfig, validation: Validation, budget: Budget, **kwargs: Any) -> None:
        """Take the Trainer's own arguments as keywords."""
        super().__init__(**kwargs)
        self.urm_config = config
        self.urm: Urm = kwargs["model"]
        self.validation = validation
        self.budget = budget
        self._sums: dict[str, float] = {"recall_loss": 0.0, "text_loss": 0.0}
        self._examples, self._batches = 0, 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, UrmOutput]:
        """NCE of the targets plus η times the text's negative log-likelihood."""
        output: UrmOutput = model(inputs)
        device = output.user_vectors.device.type
        with mixed_precision(device):  # the products of the sampled loss need no more; retrieval's do
            recall = sampled_nce(
                output.user_vectors,
                output.item_vectors[inputs["targets"]],
                inputs["target_mask"],
                output.item_vectors[inputs["negatives"]],
                inputs["log_expected"],
                inputs["accidental"],
                self.urm_config.combine,
            )
        text = text_loss(output.text_logits, inputs["labels"])
        self._sums["recall_loss"] += float(recall.detach())
        self._sums["text_loss"] += float(text.detach())
        self._batches += 1
        self._examples += len(inputs["block_rows"])
        loss = recall + self.urm_config.text_loss_weight * text
        return (loss, output) if return_outputs else loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for the backbone and one for the new modules."""
        if self.optimizer is None:
            named = list(self.urm.named_parameters())
            backbone = [weight for name, weight in named if name.startswith("backbone.")]
            new = [weight for name, weight in named if not name.startswith("backbone.")]
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": new, "lr": self.urm_config.learning_rate},
                    {"params": backbone, "lr": self.urm_config.backbone_learning_rate},
                ],
                weight_decay=WEIGHT_DECAY,
                fused=True,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The budget's schedule for both groups."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(), self.budget.rate
            )
        return self.lr_scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation recall on the full catalogue; `eval_recall` is the mean over tasks."""
        recall = self.validation.measure(self.urm)
        metrics = {"eval_recall": recall.pop("mean")} | {f"eval_recall_{task}": value for task, value in recall.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the two losses and the speed to what the Trainer logs of the steps since the last time."""
        if "loss" in logs and self._batches:
            logs |= {name: value / self._batches for name, value in self._sums.items()}
            logs["examples_per_second"] = self._examples / max(self.budget.seconds, 1e-9)
            self._sums, self._batches = dict.fromkeys(self._sums, 0.0), 0
        super().log(logs, start_time)


class _KeepBudget(TrainerCallback):
    """Ends the training cleanly when the time is over, marks checkpoints as complete, passes metrics on."""

    def __init__(self, budget: Budget, report: Report) -> None:
        self.budget = budget
        self.report = report

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.budget.is_spent or state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.budget.save(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / COMPLETE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        metrics = {name.replace("eval_", "validation_"): float(value) for name, value in (logs or {}).items()}
        metrics.pop("epoch", None)
        self.report(state.global_step, metrics)


def _arguments(config: UrmConfig, scratch: Path, device: str, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(scratch),
        max_steps=config.max_steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.eval_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        load_best_model_at_end=True,
        metric_for_best_model="recall",
        greater_is_better=True,
        max_grad_norm=MAX_GRADIENT_NORM,
        logging_steps=min(LOG_STEPS, config.eval_steps),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        seed=seed,
    )


def _only(items: list[Batch]) -> Batch:
    return items[0]
