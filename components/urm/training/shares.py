"""Several processes, one batch: each trains its share of a step's contexts, and the gradients stay the same.

Every process builds the whole batch of a step, which is a pure function of the seed and the step (see steps.py), and
keeps its part of the contexts; candidates, negatives and targets stay those of the whole. Losses are means over
examples and over text tokens, and distributed training averages the gradients of the processes. With W processes, of
which process r has e_r of the E examples and m_r of the M text tokens, the gradient of

    loss_r = (W e_r / E) · NCE_r + η (W m_r / M) · text_r

averages to that of the whole batch's loss, however unequal the shares are.
"""

import torch
from torch.utils.data import Dataset

from components.exceptions import ConfigError
from components.urm.data.batch import TrainingBatch


class Shares(Dataset[TrainingBatch]):
    """The batches of one process among several."""

    def __init__(self, steps: Dataset[TrainingBatch], process: int, num_processes: int) -> None:
        """Take a data set whose item s is the whole batch of step s."""
        self._steps = steps
        self._process = process
        self._num_processes = num_processes

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._steps)  # type: ignore[arg-type]  # Dataset declares no length

    def __getitem__(self, step: int) -> TrainingBatch:
        """This process's share of a step."""
        return take_share(self._steps[step], self._process, self._num_processes)


def take_share(batch: TrainingBatch, process: int, num_processes: int) -> TrainingBatch:
    """The part of a batch that one process trains: neighbouring contexts with all their blocks.

    Raises:
        ConfigError: There are fewer contexts than processes.
    """
    num_contexts, length = batch["token_ids"].shape
    if num_contexts < num_processes:
        raise ConfigError(
            "field urm.contexts_per_batch",
            expected=f"at least {num_processes}, one per process",
            got=num_contexts,
            remedy="raise it or start fewer processes",
        )
    first, end = num_contexts * process // num_processes, num_contexts * (process + 1) // num_processes
    contexts = slice(first, end)
    blocks = _within(batch["block_rows"], first, end)
    items = _within(batch["item_positions"][0], first, end)
    spoken = _within(batch["lm_positions"], first * length, end * length)
    tasks = batch["task_positions"][blocks]
    return {
        "token_ids": batch["token_ids"][contexts],
        "positions": batch["positions"][contexts],
        "segments": batch["segments"][contexts],
        "item_positions": batch["item_positions"][:, items] - torch.tensor([[first], [0]]),
        "item_columns": batch["item_columns"][items],
        "user_positions": batch["user_positions"][blocks] - first * length,
        "task_positions": torch.where(tasks >= 0, tasks - first * length, tasks),
        "lm_positions": batch["lm_positions"][spoken] - first * length,
        "labels": batch["labels"][spoken],
        "block_rows": batch["block_rows"][blocks] - first,
        "history_items": batch["history_items"][contexts],
        "history_counts": batch["history_counts"][contexts],
        "history_days_since": batch["history_days_since"][contexts],
        "history_behaviors": batch["history_behaviors"][contexts],
        "history_known": batch["history_known"][contexts],
        "queries": batch["queries"][blocks],
        "meanings": batch["meanings"][blocks],
        "doubts": batch["doubts"][blocks],
        "named": batch["named"][blocks],
        "items": batch["items"],
        "targets": batch["targets"][blocks],
        "target_mask": batch["target_mask"][blocks],
        "negatives": batch["negatives"],
        "log_expected": batch["log_expected"],
        "accidental": batch["accidental"][blocks],
        "recall_share": torch.tensor(num_processes * int(blocks.sum()) / len(blocks)),
        "text_share": torch.tensor(num_processes * int(spoken.sum()) / max(len(spoken), 1)),
    }


def _within(places: torch.Tensor, first: int, end: int) -> torch.Tensor:
    return (places >= first) & (places < end)
