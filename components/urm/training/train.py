"""SFT by the Hugging Face Trainer: two learning rates, checkpoints, resume, best checkpoint by validation recall.

Started by `torchrun` or `accelerate launch`, several processes train one model: each takes its share of a step's
contexts (see shares.py), the clock and the validation of the first one decide for all, and it alone reports and saves.
On SIGTERM a training saves a checkpoint after its current step and ends.
The weights equal those of one process, up to the order of sums.
"""

import copy
from dataclasses import dataclass

import structlog
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainingArguments

from components.config import UrmConfig
from components.exceptions import ConfigError, StoppedError
from components.urm.data.batch import TrainingBatch
from components.urm.network.model import Urm
from components.urm.training.callbacks import KeepBudget, Report, Wishes
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.schedule import Budget
from components.urm.training.sharding import gather_weights, shard_model
from components.urm.training.trainer import UrmTrainer
from components.urm.training.validation import Validation

log = structlog.get_logger()

MAX_GRADIENT_NORM = 1.0
LOG_STEPS = 10


@dataclass(frozen=True)
class TrainingSummary:
    """Outcome of a training."""

    steps: int
    seconds: float  # duration, evaluations included
    best_step: int  # step of the weights kept
    best_recall: float  # their validation recall, mean over tasks
    stopped_by: str  # "steps", "time", or "patience"


def train(
    model: Urm,
    steps: Dataset[TrainingBatch],
    validation: Validation,
    config: UrmConfig,
    *,
    checkpoints: Checkpoints,
    device: str,
    seed: int,
    report: Report,
    sharded: bool = False,
) -> TrainingSummary:
    """Train in place; the model ends with the weights of the evaluation with the best validation recall.

    A training that was killed or stopped and is started again with the same arguments goes on from its newest complete
    checkpoint. It ends with the weights of an uninterrupted one, bit for bit, as long as its rates do not depend on the
    clock (see `Budget`) and the hardware is the same. Item s of `steps` is the batch of step s. The seed is that of
    dropout; batches have their own. `report` is called with a step and its metrics when there are new ones; after a
    resume, steps between the checkpoint and the end of the earlier attempt are reported again.

    With `sharded`, weights and optimiser states are split over the processes, and the model of the first process ends
    with the whole weights.

    Raises:
        ConfigError: It was started with accelerate's own FSDP or DeepSpeed.
        StoppedError: SIGTERM ended it early, after a checkpoint.
        UnavailableError: The store of the checkpoints does not answer, or another attempt has taken over.
    """
    budget, wishes = Budget(config.max_steps, config.max_seconds), Wishes()
    arguments = _arguments(config, checkpoints, device, seed)
    trained = model
    if sharded:
        trained = copy.deepcopy(model)
        shard_model(trained, arguments.device)
    trainer = UrmTrainer(
        model=trained,
        args=arguments,
        train_dataset=steps,
        eval_dataset=validation,  # never indexed: evaluate() below measures it whole
        data_collator=_only,
        callbacks=[KeepBudget(budget, wishes, report, config.patience)],
        config=config,
        validation=validation,
        budget=budget,
        checkpoints=checkpoints,
        wishes=wishes,
        sharded=sharded,
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # their checkpoints are others than ours
        raise ConfigError(
            "training",
            expected="processes of torchrun or of a plain `accelerate launch`",
            got="accelerate's own FSDP or DeepSpeed",
            remedy="set URM_SHARD_MODEL=true in its place",
        )
    trainer.remove_callback(PrinterCallback)  # `report` replaces it
    checkpoint = trainer.restore()
    if checkpoint is not None:
        log.info("resuming", checkpoint=checkpoint.name, seconds=round(budget.seconds, 1))
    with trainer.catching_sigterm():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        checkpoints.wait()
    if wishes.stop or trainer.terminated:
        raise StoppedError(
            "training",
            expected="to run to its end",
            got=f"SIGTERM at step {trainer.state.global_step}",
            remedy="run the stage again to go on from its newest checkpoint",
        )
    if sharded:
        weights = gather_weights(trained)
        if trainer.accelerator.is_main_process:
            model.load_state_dict(weights, strict=False)  # without the tied output embedding
    state = trainer.state
    return TrainingSummary(
        steps=state.global_step,
        seconds=round(budget.seconds, 1),
        best_step=state.best_global_step or state.global_step,
        best_recall=float(state.best_metric or 0.0),
        stopped_by=_reason(state.global_step, budget),
    )


def _reason(steps: int, budget: Budget) -> str:
    if steps >= budget.max_steps:
        return "steps"
    return "time" if budget.is_spent else "patience"


def _arguments(config: UrmConfig, checkpoints: Checkpoints, device: str, seed: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints.folder),
        max_steps=config.max_steps,
        per_device_train_batch_size=1,  # an item of the data set is a whole batch
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=config.eval_steps,
        save_steps=config.eval_steps,
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
        ddp_find_unused_parameters=not config.copy_path,  # with it, every weight is part of every step
        seed=seed,
    )
    # A process trains on one GPU; with more of them the Trainer would split each batch over all by DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _only(items: list[TrainingBatch]) -> TrainingBatch:
    return items[0]
