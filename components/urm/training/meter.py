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
        self._sums = [0.0] * len(losses)
        self._examples = 0.0
        self._steps = 0
        self._since = time.monotonic()

    def add(self, *losses: float, examples: int) -> None:
        """Add a step of this process: its parts of the loss and its number of examples."""
        self._sums = [total + loss for total, loss in zip(self._sums, losses, strict=True)]
        self._examples += examples
        self._steps += 1

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
        sums = total(torch.tensor([*self._sums, self._examples], dtype=torch.float64)).tolist()
        return {"sums": sums, "steps": self._steps, "seconds": time.monotonic() - self._since}

    def resume(self, state: dict[str, Any], *, first: bool) -> None:
        """Continue from the state of a checkpoint; the first process takes the sums of all."""
        if first:
            *self._sums, self._examples = state["sums"]
        self._steps = state["steps"]
        self._since = time.monotonic() - state["seconds"]

    def report(self, total: Sum, num_processes: int) -> dict[str, float]:
        """Mean losses and examples per second over all processes; then reset. `total` sums over the processes."""
        sums = total(torch.tensor([*self._sums, self._examples], dtype=torch.float64)).tolist()
        count = max(self._steps, 1) * num_processes
        figures = {name: value / count for name, value in zip(self._losses, sums[:-1], strict=True)}
        figures["examples_per_second"] = sums[-1] / max(time.monotonic() - self._since, 1e-9)
        self._sums, self._examples, self._steps = [0.0] * len(self._losses), 0.0, 0
        self._since = time.monotonic()
        return figures


def peak_memory(device: str) -> dict[str, float]:
    """Peak memory of this process: of the machine, and of the accelerator if there is one."""
    figures = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / _GIB}
    if device.startswith("cuda"):
        figures["peak_device_memory_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return figures
