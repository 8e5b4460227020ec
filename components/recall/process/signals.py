"""How long-running processes of the runtime are told to end."""

import signal
from collections.abc import Callable


def on_termination(stop: Callable[[], None]) -> None:
    """Let SIGTERM and SIGINT stop this process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())
