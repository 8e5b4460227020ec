"""The Hugging Face Trainer with URM's loss, two learning rates and its own evaluation."""

from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import Trainer

from components.config import UrmConfig
from components.device import mixed_precision
from components.urm.data.batch import TrainingBatch
from components.urm.network.model import Urm, UrmOutput
from components.urm.training.loss import recall_loss, text_loss
from components.urm.training.meter import Meter, peak_memory
from components.urm.training.schedule import Budget
from components.urm.training.shares import Shares
from components.urm.training.validation import Validation

WEIGHT_DECAY = 0.01


class UrmTrainer(Trainer):
    """Trains URM; data set item s is the batch of step s, and only `validation` is evaluated."""

    def __init__(self, *, config: UrmConfig, validation: Validation, budget: Budget, **kwargs: Any) -> None:
        """Take the Trainer's own arguments as keywords."""
        super().__init__(**kwargs)
        self.urm_config = config
        self.urm: Urm = kwargs["model"]
        self.validation = validation
        self.budget = budget
        self.steps: Dataset[TrainingBatch] = kwargs["train_dataset"]
        self.meter = Meter("recall_loss", "text_loss")

    def get_train_dataloader(self) -> DataLoader[TrainingBatch]:
        """Batches of this process; with several processes, each gets a share of every step instead of whole steps."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return super().get_train_dataloader()
        shares = Shares(self.steps, self.accelerator.process_index, processes)
        return DataLoader(
            shares,
            batch_size=1,
            sampler=SequentialSampler(shares),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a step; then all processes read the clock of the first one."""
        loss = super().training_step(*args, **kwargs)
        self.budget.read(self._agree([self.budget.seconds])[0])
        return loss

    def compute_loss(  # type: ignore[override]  # a TypedDict is a dict at run time only
        self,
        model: torch.nn.Module,
        inputs: TrainingBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, UrmOutput]:
        """NCE of the targets plus η times the text's negative log-likelihood."""
        output: UrmOutput = model(inputs)
        with mixed_precision(output.user_vectors.device.type):  # enough for the sampled loss; retrieval needs more
            recall = recall_loss(output, inputs, self.urm_config.combine)
        recall, text = recall * inputs["recall_share"], text_loss(output.text_logits, inputs["labels"])
        text = text * inputs["text_share"]
        self.meter.add(float(recall.detach()), float(text.detach()), examples=len(inputs["block_rows"]))
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
        with self.meter.paused():
            measured = self.validation.measure(self.urm)
        recall = dict(zip(measured, self._agree(list(measured.values())), strict=True))
        metrics = {"eval_recall": recall.pop("mean")} | {f"eval_recall_{task}": value for task, value in recall.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add losses, speed, memory and the backbone's learning rate to the Trainer's metrics."""
        if "loss" in logs:
            logs |= self.meter.report(self._total, self.accelerator.num_processes)
            logs |= peak_memory(self.args.device.type)
            share = self.urm_config.backbone_learning_rate / self.urm_config.learning_rate
            logs["backbone_learning_rate"] = logs["learning_rate"] * share
        super().log(logs, start_time)

    def _agree(self, values: list[float]) -> list[float]:
        """The first process's values."""
        if self.accelerator.num_processes == 1:
            return values
        torch.distributed.broadcast_object_list(values, src=0, device=self.args.device)
        return values

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes."""
        total: torch.Tensor = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
        return total
