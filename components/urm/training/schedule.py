"""Learning rate over a training that ends after a number of steps or a time, whichever comes first."""

import math
import time

WARM_UP_SHARE = 0.05
FLOOR = 0.02  # of the peak rate, reached at the end


class Budget:
    """Counts steps and seconds of one training; the seconds continue after a resume.

    The rate uses the time of the last `read`, zero at the start, so that all processes can agree on one reading. While
    the steps are ahead of it (`step / max_steps >= seconds / max_seconds`) the rate depends on the step alone. A
    training that stays ahead throughout, as with a generous time limit, therefore has the same rates bit for bit,
    however often it is stopped and resumed.
    """

    def __init__(self, max_steps: int, max_seconds: float) -> None:
        """Start the clock."""
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self._started = time.monotonic()
        self._read = 0.0

    @property
    def seconds(self) -> float:
        """Seconds spent so far, earlier attempts included."""
        return time.monotonic() - self._started

    def read(self, seconds: float | None = None) -> None:
        """Set the time for the rate and the end: of this process, or the seconds that another process has spent."""
        self._read = self.seconds if seconds is None else seconds

    @property
    def is_spent(self) -> bool:
        """Whether the time was up at the last reading."""
        return self._read >= self.max_seconds

    def progress(self, step: int) -> float:
        """Share of the training that is done, from 0 to 1, by the limit that is nearer."""
        return min(1.0, max(step / self.max_steps, self._read / self.max_seconds))

    def rate(self, step: int) -> float:
        """Learning rate as a share of its peak: linear warm-up, then half a cosine down to FLOOR.

        Both go by the limit that is nearer: where the time ends the training, it ends the warm-up.
        """
        progress = self.progress(step)
        warm = max((step + 1) / max(1.0, WARM_UP_SHARE * self.max_steps), progress / WARM_UP_SHARE)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return min(1.0, warm) * (FLOOR + (1 - FLOOR) * cosine)

    def resume(self, seconds: float) -> None:
        """Continue from the seconds that earlier attempts have spent."""
        self._read = seconds
        self._started = time.monotonic() - seconds
