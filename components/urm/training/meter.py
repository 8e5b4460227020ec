"""What a training tells of itself between two reports: losses, speed and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Sum = Callable[[torch.Tensor], torch.Tensor]
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
_GIB = 1024**3


class Meter:
    """Sums over the steps since the last report; evaluations do not count as training time."""

    def __init__(self, *losses: str) -> None:
        """Name the parts of the loss."""
        self._losses = losses
        self._sums = [0.0] * len(losses)
        self._examples = self._steps = 0
        self._since = time.monotonic()

    def add(self, *losses: float, examples: int) -> None:
        """Count a step of this process: its parts of the loss and how many examples it trained."""
        self._sums = [total + loss for total, loss in zip(self._sums, losses, strict=True)]
        self._examples += examples
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what the body does out of the training time."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    def report(self, total: Sum, num_processes: int) -> dict[str, float]:
        """Means of the losses and examples a second over all processes; then start anew.

        Args:
            total: Adds a float64 tensor up over the processes.
            num_processes: How many there are; their losses are averaged, their examples added.
        """
        sums = total(torch.tensor([*self._sums, self._examples], dtype=torch.float64)).tolist()
        count = max(self._steps, 1) * num_processes
        figures = {name: value / count for name, value in zip(self._losses, sums[:-1], strict=True)}
        figures["examples_per_second"] = sums[-1] / max(time.monotonic() - self._since, 1e-9)
        self._sums, self._examples, self._steps = [0.0] * len(self._losses), 0, 0
        self._since = time.monotonic()
        return figures


def peak_memory(device: str) -> dict[str, float]:
    """Most memory this process has held so far: of the machine, and of the accelerator where there is one."""
    figures = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / _GIB}
    if device.startswith("cuda"):
        figures["peak_device_memory_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return figures
