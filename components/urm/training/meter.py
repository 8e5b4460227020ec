"""Training metrics between two reports: losses, speed and memory."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Sum = Callable[[torch.Tensor], torch.Tensor]
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
_GIB = 1024**3


class Meter:
    """Sums over the steps since the last report; evaluations do not count as training time."""

    def __init__(self, *losses: str) -> None:
        """Take the names of the parts of the loss."""
        self._losses = losses
        self._sums: list[float] = []
        self._reset()

    def add(self, *losses: tuple[float, float], examples: int) -> None:
        """Add a step of this process: each part of the loss with its weight, and the number of examples."""
        own = [part for loss, weight in losses for part in (weight * loss, weight)]
        self._sums = [total + part for total, part in zip(self._sums, [*own, examples], strict=True)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body from the training time."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    def state(self, total: Sum) -> dict[str, Any]:
        """The sums over all processes, for a checkpoint."""
        return {"sums": self._total(total), "seconds": time.monotonic() - self._since}

    def resume(self, state: dict[str, Any], *, first: bool) -> None:
        """Continue from the state of a checkpoint; the first process takes the sums of all."""
        if first:
            self._sums = state["sums"]
        self._since = time.monotonic() - state["seconds"]

    def report(self, total: Sum) -> dict[str, float]:
        """Weighted mean of each part of the loss that had a weight, and examples per second; then reset.

        `total` sums over the processes.
        """
        *parts, examples = self._total(total)
        pairs = zip(self._losses, parts[::2], parts[1::2], strict=True)
        figures = {name: weighted / weight for name, weighted, weight in pairs if weight > 0}
        figures["examples_per_second"] = examples / max(time.monotonic() - self._since, 1e-9)
        self._reset()
        return figures

    def _total(self, total: Sum) -> list[float]:
        sums: list[float] = total(torch.tensor(self._sums, dtype=torch.float64)).tolist()
        return sums

    def _reset(self) -> None:
        self._sums = [0.0] * (2 * len(self._losses) + 1)  # weighted sum and weight of each part; examples
        self._since = time.monotonic()


def peak_memory(device: str) -> dict[str, float]:
    """Peak memory of this process: of the machine, and of the accelerator if there is one."""
    figures = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / _GIB}
    if device.startswith("cuda"):
        figures["peak_device_memory_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return figures
