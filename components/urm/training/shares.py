"""Several processes, one batch: each trains its share of a step's contexts, and the gradients come out the same.

Every process builds the whole batch of a step, which is a pure function of the seed and the step (see examples.py),
and keeps its part of the contexts; candidates, negatives and targets stay those of the whole. Losses are means over
examples and over text tokens, and distributed training averages the gradients of the processes. With W processes, of
which process r has e_r of the E examples and m_r of the M text tokens, the gradient of

    loss_r = (W e_r / E) · NCE_r + η (W m_r / M) · text_r

averages to that of the whole batch's loss, however unequal the shares are.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from components.exceptions import ConfigError
from components.urm.data.batch import Batch

BY_SEQUENCE = (
    "token_ids", "positions", "segments", "history_items", "history_counts", "history_days_since",
    "history_behaviors", "history_known",
)  # fmt: skip
BY_BLOCK = ("queries", "targets", "target_mask", "accidental")
WHOLE = ("items", "negatives", "log_expected")
RECALL_SHARE, TEXT_SHARE = "recall_share", "text_share"  # weights of the two losses, see above


class Shares(Dataset[Batch]):
    """The batches of one process among several."""

    def __init__(self, steps: Dataset[Batch], process: int, num_processes: int) -> None:
        """Take the data set whose item s is the whole batch of step s."""
        self._steps = steps
        self._process = process
        self._num_processes = num_processes

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._steps)  # type: ignore[arg-type]  # Dataset declares no length

    def __getitem__(self, step: int) -> Batch:
        """This process's share of a step."""
        return take_share(self._steps[step], self._process, self._num_processes)


def take_share(batch: Batch, process: int, num_processes: int) -> Batch:
    """The part of a batch that one process trains: neighbouring contexts with all their blocks.

    Raises:
        ConfigError: There are fewer contexts than processes.
    """
    contexts, length = batch["token_ids"].shape
    if contexts < num_processes:
        raise ConfigError(
            "field urm.contexts_per_batch",
            expected=f"at least {num_processes}, one a process",
            got=contexts,
            remedy="raise it or start fewer processes",
        )
    first, end = contexts * process // num_processes, contexts * (process + 1) // num_processes
    blocks = _within(batch["block_rows"], first, end)
    items = _within(batch["item_positions"][0], first, end)
    spoken = _within(batch["lm_positions"], first * length, end * length)
    share: Batch = {name: batch[name][first:end] for name in BY_SEQUENCE}
    share |= {name: batch[name][blocks] for name in BY_BLOCK}
    share |= {name: batch[name] for name in WHOLE}
    tasks = batch["task_positions"][blocks]
    share |= {
        "block_rows": batch["block_rows"][blocks] - first,
        "user_positions": batch["user_positions"][blocks] - first * length,
        "task_positions": torch.where(tasks >= 0, tasks - first * length, tasks),
        "item_positions": batch["item_positions"][:, items] - torch.tensor([[first], [0]]),
        "item_columns": batch["item_columns"][items],
        "lm_positions": batch["lm_positions"][spoken] - first * length,
        "labels": batch["labels"][spoken],
        RECALL_SHARE: torch.tensor(num_processes * int(blocks.sum()) / len(blocks)),
        TEXT_SHARE: torch.tensor(num_processes * int(spoken.sum()) / max(len(spoken), 1)),
    }
    return share


def _within(places: torch.Tensor, first: int, end: int) -> torch.Tensor:
    return (places >= first) & (places < end)
