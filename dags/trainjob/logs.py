"""Reading a container's log piece by piece, each line once."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

# A node writes its local time, with what that is ahead of UTC.
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ?(.*)", re.DOTALL)
_SECONDS = "%Y-%m-%dT%H:%M:%S"
# Clocks of node and reader differ; what is read twice for that is left out by its timestamp.
OVERLAP_SECONDS = 60


@dataclass(frozen=True)
class Position:
    """How far the log of a pod has been read.

    Attributes:
        pod: Its uid; a pod that replaces another has a log of its own.
        time: Timestamp of the last line, in UTC to the nanosecond; empty: nothing has been read.
        lines: Lines read with this timestamp.
    """

    pod: str = ""
    time: str = ""
    lines: int = 0


def seconds_to_read(position: Position, pod: str, now: datetime) -> int | None:
    """`sinceSeconds` of the next request, which the API takes in whole seconds; none: the log from its beginning."""
    if position.pod != pod or not position.time:
        return None
    last = datetime.strptime(position.time[:19], _SECONDS).replace(tzinfo=UTC)
    return max(int((now - last).total_seconds()), 0) + OVERLAP_SECONDS


def split_lines(text: str) -> list[str]:
    """The lines of an answer: a container's own line may hold what Python takes for the end of one, too."""
    return text.removesuffix("\n").split("\n") if text else []


def split_new(lines: Sequence[str], position: Position, pod: str) -> tuple[list[str], Position]:
    """The lines behind the position, without their timestamps, and the position behind them.

    `lines` are the answer to a request with `timestamps=true`, in the order of the file. Lines of stdout and stderr may
    be some microseconds out of order, so what is new is told by its place behind the last line read; only where that is
    gone (the file was rotated) by its timestamp.
    """
    # A line without a timestamp is the kubelet's own, about a log that it cannot read.
    parsed = [found for line in lines if (found := _parse(line))]
    start = 0
    if position.pod == pod and position.time:
        same = [at for at, (time, _) in enumerate(parsed) if time == position.time]
        if same:
            start = same[: position.lines][-1] + 1
        else:
            start = next((at for at, (time, _) in enumerate(parsed) if time > position.time), len(parsed))
    new = parsed[start:]
    if not new:
        return [], position if position.pod == pod else Position(pod)
    last = new[-1][0]
    return [text for _, text in new], Position(pod, last, sum(time == last for time, _ in parsed))


def _parse(line: str) -> tuple[str, str] | None:
    """Timestamp, in UTC to the nanosecond so that texts compare as times do, and text."""
    found = _LINE.match(line)
    if found is None:
        return None
    seconds = datetime.fromisoformat(found[1] + found[3]).astimezone(UTC).strftime(_SECONDS)
    return f"{seconds}.{(found[2] or '').ljust(9, '0')}", found[4]
