"""Faults that a process of the runtime brings on itself at a named point: death, a halt, poison, a jumping clock.

They are put around the real methods of a forked worker before it starts; what happens then is a real signal.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Any

from components.recall.serving import answers, engine
from components.recall.serving.engine import Ranking, ServingRelease
from components.recall.state import events
from components.recall.state.store import UserStore
from components.recall.state.stream import EventStream
from components.recall.worker import stream as worker
from components.urm.data.request import RecallRequest

# A fault at a point strikes when the call returns: read, but nothing done; inferred, but nothing stored; committed.
POINTS: dict[str, tuple[Any, str]] = {
    "claim": (EventStream, "claim_stale"),
    "read": (EventStream, "read"),
    "read_ahead": (EventStream, "read_ahead"),
    "recent": (UserStore, "recent"),
    "infer": (worker, "answer_users"),
    "commit": (UserStore, "commit"),
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one process.

    Attributes:
        point: One of POINTS; empty for none.
        calls: Strikes at this call of the point.
        signal: SIGKILL or SIGSTOP.
        poison_item: A history whose newest item this is breaks the model.
        poison_kills: It kills the process instead, as a fault in native code does.
        clock_offsets: Seconds that the clock is off, one after the other, `clock_period` seconds each.
    """

    point: str = ""
    calls: int = 1
    signal: int = signal.SIGKILL
    poison_item: int | None = None
    poison_kills: bool = False
    clock_offsets: tuple[float, ...] = ()
    clock_period: float = 0.2


def inject(fault: Fault) -> None:
    """Prepare this process; it must be the worker's own."""
    if fault.point:
        _strike(fault)
    if fault.poison_item is not None:
        _poison(fault.poison_item, fault.poison_kills)
    if fault.clock_offsets:
        _turn_clock(fault.clock_offsets, fault.clock_period)


def _strike(fault: Fault) -> None:
    owner, name = POINTS[fault.point]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = original(*args, **kwargs)
        idle = fault.point in ("claim", "read") and not result
        calls += not idle
        if calls == fault.calls and not idle:
            os.kill(os.getpid(), fault.signal)
        return result

    setattr(owner, name, struck)


def _poison(item: int, kills: bool) -> None:
    original = ServingRelease.recommend

    def recommend(self: ServingRelease, requests: Sequence[RecallRequest], k: int) -> list[Ranking]:
        if any(item in request.context.item_ids[:1] for request in requests):
            if kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("index out of range in self")
        return original(self, requests, k)

    ServingRelease.recommend = recommend  # type: ignore[method-assign]  # the fault, for this process alone


def _turn_clock(offsets: tuple[float, ...], period: float) -> None:
    """Let `time.time` and `datetime.now` of the runtime jump; `time.monotonic` does not, as on a real machine."""
    true_time = time.time
    started = time.monotonic()

    def offset() -> float:
        return offsets[int((time.monotonic() - started) / period) % len(offsets)]

    class JumpingDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # typeshed says Self
            return datetime.now(tz) + timedelta(seconds=offset())

    time.time = lambda: true_time() + offset()
    for module in (answers, engine, events):
        module.datetime = JumpingDatetime  # type: ignore[attr-defined]  # an import, no name that it exports
