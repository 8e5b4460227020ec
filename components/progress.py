"""Progress of long work: how much is done, how fast, and how long the rest will take."""

import time
from collections.abc import Callable

Report = Callable[[str], None]
INTERVAL_SECONDS = 10.0


class Progress:
    """Counts what is done and reports it now and then.

    Args:
        report: Called with a line for people, at most every `INTERVAL_SECONDS`.
        work: What is done, e.g. "writing events".
        unit: What is counted, in the plural.
        total: How much there is; None: nobody knows.
    """

    def __init__(self, report: Report, work: str, unit: str, total: int | None = None) -> None:
        self._report, self._work, self._unit, self._total = report, work, unit, total
        self._done, self._started = 0, time.monotonic()
        self._next = self._started + INTERVAL_SECONDS

    @property
    def done(self) -> int:
        """How much is done."""
        return self._done

    def add(self, amount: int) -> None:
        """Count so many more as done."""
        self._done += amount
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + INTERVAL_SECONDS
        rate = self._done / (now - self._started)
        said = f"{self._work}: {self._done:,} {self._unit}, {rate:,.0f} per second"
        if self._total and rate:
            said += f", {self._done / self._total:.0%}, {(self._total - self._done) / rate:,.0f} s to go"
        self._report(said)
