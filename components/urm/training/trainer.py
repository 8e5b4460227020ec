"""The Hugging Face Trainer with URM's loss, two learning rates and its own evaluation."""

import json
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from components.config import UrmConfig
from components.device import mixed_precision
from components.exceptions import ConfigError, UnavailableError
from components.urm.data.batch import TrainingBatch
from components.urm.network.model import Urm, UrmOutput
from components.urm.training.callbacks import Wishes, count_since_best
from components.urm.training.checkpoints import COMPLETE, Checkpoints
from components.urm.training.loss import recall_loss, text_loss
from components.urm.training.meter import Meter, peak_memory
from components.urm.training.schedule import Budget
from components.urm.training.sharding import load_shards, save_shards
from components.urm.training.shares import Shares
from components.urm.training.validation import Validation

WEIGHT_DECAY = 0.01
_METER = "meter.json"


class UrmTrainer(Trainer):
    """Trains URM; data set item s is the batch of step s, and only `validation` is evaluated."""

    def __init__(
        self,
        *,
        config: UrmConfig,
        validation: Validation,
        budget: Budget,
        checkpoints: Checkpoints,
        wishes: Wishes,
        sharded: bool,
        **kwargs: Any,
    ) -> None:
        """Take the Trainer's own arguments as keywords, and whether the model is split over the processes."""
        super().__init__(**kwargs)
        self.urm_config = config
        self.urm: Urm = kwargs["model"]
        self.validation = validation
        self.budget = budget
        self.checkpoints = checkpoints
        self.wishes = wishes
        self.sharded = sharded
        # The Trainer's name for a model whose shards and gradients are not Accelerate's, which shards on GPUs alone.
        self.is_distributed_loading_by_transformers = sharded
        self.terminated = False  # this process got SIGTERM
        self._best_before: tuple[float | None, int | None] = (None, None)
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

    @contextmanager
    def catching_sigterm(self) -> Iterator[None]:
        """Let SIGTERM end the training after its current step, with a checkpoint, instead of at once."""
        if threading.current_thread() is not threading.main_thread():  # signals belong to the main one
            yield
            return

        def note(*_: object) -> None:
            self.terminated = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def restore(self) -> Path | None:
        """Local folder of the checkpoint that all processes resume, chosen by the first one; None to start anew.

        Raises:
            UnavailableError: The store does not answer, or has no longer what the first process found there.
            ConfigError: The checkpoint is of a whole model and this one is sharded, or the other way round.
        """
        accelerator = self.accelerator
        step = self.checkpoints.restore() if accelerator.is_main_process else None
        step = self._agree([step])[0]
        if step is None:
            return None
        # Machines share nothing but the store, and the processes of a machine its disk.
        if accelerator.is_local_main_process and not accelerator.is_main_process and not self.checkpoints.fetch(step):
            raise UnavailableError(
                f"checkpoint of step {step}",
                expected="the same on every machine",
                got="a damaged one on this",
                remedy="start the stage again",
            )
        accelerator.wait_for_everyone()
        folder = self.checkpoints.path(step)
        if (folder / SAFE_WEIGHTS_NAME).exists() == self.sharded:
            kinds = ("sharded", "whole")
            raise ConfigError(
                f"checkpoint of step {step}",
                expected=f"that of a {kinds[not self.sharded]} model",
                got=f"a {kinds[self.sharded]} one's",
                remedy="set URM_SHARD_MODEL as it was, or remove the checkpoints",
            )
        self.budget.resume(json.loads((folder / COMPLETE).read_text())["seconds"])
        self.meter.resume(json.loads((folder / _METER).read_text()), first=accelerator.is_main_process)
        return folder

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """Load the Trainer's state, then find the best weights that it tells of, or forget them if they are lost.

        A training that had ended has no epoch left: killed afterwards and started again, it takes no step.
        """
        trained = super()._init_training_state(*args)
        num_epochs: int = args[2]
        best, first = self.state.best_global_step, self.accelerator.is_main_process
        if best and not self._agree([first and self.checkpoints.fetch(best)])[0]:
            self.state.best_metric = self.state.best_global_step = None
        elif best and (first or self.sharded):
            self.state.best_model_checkpoint = str(self.checkpoints.path(best))
        return (num_epochs, 0) if self._has_ended() else trained

    def _has_ended(self) -> bool:
        """Whether the state is that after the last evaluation, by time or patience."""
        patience = self.urm_config.patience
        evaluated = any(
            "eval_recall" in entry and entry["step"] == self.state.global_step for entry in self.state.log_history
        )
        return evaluated and (self.budget.is_spent or 0 < patience <= count_since_best(self.state))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a step; then all processes agree on the first one's clock and on what to do."""
        loss = super().training_step(*args, **kwargs)
        first = self.accelerator.is_main_process
        own = [self.budget.seconds * first, self.checkpoints.is_due and first, self.terminated]
        seconds, save, stop = self._total(torch.tensor(own, dtype=torch.float64)).tolist()
        self.budget.read(seconds)
        self.wishes.save, self.wishes.stop = save > 0, stop > 0
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
        text = text_loss(output.text_logits, inputs["labels"])
        recall_share, text_share = inputs["recall_share"], inputs["text_share"]
        self.meter.add(
            (float(recall.detach()), float(recall_share)),
            (float(text.detach()), float(text_share)),
            examples=len(inputs["block_rows"]),
        )
        loss = recall_share * recall + self.urm_config.text_loss_weight * text_share * text
        return (loss, output) if return_outputs else loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate for the backbone and one for the new modules."""
        if self.optimizer is None:
            named = list(self.urm.named_parameters())
            backbone = [weight for name, weight in named if name.startswith("backbone.")]
            new = [weight for name, weight in named if not name.startswith("backbone.")]
            self.optimizer = self.adamw = torch.optim.AdamW(
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
            self.lr_scheduler = self.schedule = torch.optim.lr_scheduler.LambdaLR(
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
            logs |= self.meter.report(self._total)
            # The Trainer's own sum does not outlive an interruption between two reports.
            logs["loss"] = logs["recall_loss"] + self.urm_config.text_loss_weight * logs.get("text_loss", 0.0)
            logs |= peak_memory(self.args.device.type)
            share = self.urm_config.backbone_learning_rate / self.urm_config.learning_rate
            logs["backbone_learning_rate"] = logs["learning_rate"] * share
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._best_before = (self.state.best_metric, self.state.best_global_step)
        return super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save what `restore` reads; the training goes on if that fails, and then the step cannot be the best one."""
        with self.meter.paused():
            step, first = self.state.global_step, self.accelerator.is_main_process
            states, meter = self._random_states(), self.meter.state(self._total)
            if first:
                self.checkpoints.begin(step)
            whole = True
            if self.sharded:
                self.accelerator.wait_for_everyone()
                whole = save_shards(self.checkpoints.shards(step), self.urm, self.adamw)

            def write(folder: Path) -> None:
                if self.sharded:
                    torch.save(self.schedule.state_dict(), folder / SCHEDULER_NAME)
                else:
                    self.save_model(str(folder), _internal_call=True)
                    self._save_optimizer_and_scheduler(str(folder))
                for name, content in states.items():
                    (folder / name).write_bytes(content)
                (folder / _METER).write_text(json.dumps(meter))
                self.state.best_model_checkpoint = None  # a path of this machine
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

            best = self.state.best_global_step
            saved = (
                first and whole and self.checkpoints.save(step, best, self.budget.seconds, write, sharded=self.sharded)
            )
            if not self._agree([saved])[0] and best == step:
                self.state.best_metric, best = self._best_before
                self.state.best_global_step = best
            if best is not None and (first or self.sharded):
                self.state.best_model_checkpoint = str(self.checkpoints.path(best))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self.sharded:  # shards follow with those of the optimizer
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_shards(self.checkpoints.shards(self.state.global_step), self.urm, self.adamw)
        self.schedule.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_best_model(self) -> None:
        if self.sharded:
            load_shards(self.checkpoints.shards(self.state.best_global_step or 0), self.urm)
        else:
            super()._load_best_model()

    def _random_states(self) -> dict[str, bytes]:
        """Files with the states of the random generators of all processes, as the Trainer loads them."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            own = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        gathered = [own] * self.accelerator.num_processes
        if len(gathered) > 1:
            torch.distributed.all_gather_object(gathered, own)
        return {name: content for files in gathered for name, content in files.items()}

    def _agree(self, values: list[Any]) -> list[Any]:
        """The first process's values."""
        if self.accelerator.num_processes == 1:
            return values
        torch.distributed.broadcast_object_list(values, src=0, device=self.args.device)
        return values

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over the processes."""
        total: torch.Tensor = self.accelerator.reduce(values.to(self.args.device), reduction="sum")
        return total
