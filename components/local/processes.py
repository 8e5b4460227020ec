"""Background processes that outlive the command that starts them, and ports for them."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from components.exceptions import UnavailableError
from components.process_start import ticks_at_start

HOST = "127.0.0.1"
_POLL_SECONDS = 0.3
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PORTS_LOCK = "\0urm-ports"
# Handles of processes meant to outlive this one; a dropped handle would be reported as forgotten.
_left_running: list[subprocess.Popen[bytes]] = []


class ProcessRecord(BaseModel):
    """A started process, told apart from a later one with the same id by when it began."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: str  # the machine's boot, and ticks since then: clocks may be set


def spawn(command: Sequence[str], *, environment: dict[str, str], log: Path, folder: Path) -> ProcessRecord:
    """Start a process in a session of its own, with this environment alone, its output appended to the log.

    Raises:
        UnavailableError: The program cannot be started.
    """
    process = _popen(command, environment, log, folder)
    _left_running.append(process)
    return ProcessRecord(pid=process.pid, started=_started(process.pid))


def run_to_end(command: Sequence[str], *, environment: dict[str, str], log: Path, folder: Path) -> int:
    """As `spawn`, but wait for the end and return the exit code."""
    return _popen(command, environment, log, folder).wait()


def _popen(command: Sequence[str], environment: dict[str, str], log: Path, folder: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("ab") as output:
            return subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise UnavailableError(
            f"program {command[0]}",
            expected="a program that starts",
            got=error.strerror,
            remedy="install the project again with `make setup`",
        ) from None


def find(record: ProcessRecord) -> psutil.Process | None:
    """The recorded process if it still runs; None if it ended or another one has its id now."""
    try:
        process = psutil.Process(record.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            process.wait(0)  # reaps it if it is a child of ours
            return None
        same = _started(record.pid) == record.started
    except psutil.Error:
        return None
    return process if same else None


def _started(pid: int) -> str:
    """When a process began, in the words of its record."""
    return f"{_BOOT.read_text().strip()} {ticks_at_start(pid)}"


def stop(records: Sequence[ProcessRecord], grace_seconds: float) -> None:
    """End processes with their whole trees: SIGTERM to their groups, SIGKILL to what is left after the grace."""
    trees: list[psutil.Process] = []
    for record in records:
        process = find(record)
        if process is None:
            continue
        # Children may lead sessions of their own (a running stage does), which a signal to the group misses.
        with suppress(psutil.Error):
            trees += process.children(recursive=True)
        trees.append(process)
        with suppress(ProcessLookupError):
            os.killpg(record.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(trees, timeout=grace_seconds)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=grace_seconds)
    _left_running[:] = [process for process in _left_running if process.poll() is None]


def memory_bytes(record: ProcessRecord) -> int:
    """Memory of a process and its children; pages they share count once among them (proportional set size)."""
    process = find(record)
    return 0 if process is None else tree_memory_bytes(process)


def tree_memory_bytes(process: psutil.Process) -> int:
    """The same of any process; what has ended meanwhile counts nothing."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            full = member.memory_full_info()
            total += getattr(full, "pss", full.rss)
    return total


def choose_port(*wanted: int, taken: set[int]) -> int:
    """The first wanted port that is free on the loopback interface, else any free one; it is added to `taken`."""
    for port in (*wanted, 0):
        if port in taken:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            chosen = int(probe.getsockname()[1])
        taken.add(chosen)
        return chosen
    raise UnavailableError("loopback ports", expected="a free one", got="none", remedy="stop some other service")


@contextmanager
def ports_reserved(say: Callable[[str], None], timeout_seconds: float = 300.0) -> Iterator[None]:
    """Between the choice of a free port and its use nobody else on this machine chooses, whoever it is.

    A name in the kernel's abstract space does it: it is free again as soon as its process has ended.

    Raises:
        UnavailableError: Another one does not end in time.
    """
    deadline, waiting = time.monotonic() + timeout_seconds, False
    with socket.socket(socket.AF_UNIX) as lock:
        while True:
            try:
                lock.bind(_PORTS_LOCK)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        "loopback ports",
                        expected="other services that start on this machine to be ready",
                        got=f"none within {timeout_seconds:.0f} s",
                        remedy="look for another `urm up` or `urm demo`",
                    ) from None
            if not waiting:
                say("waiting for other services that start on this machine")
            waiting = True
            time.sleep(_POLL_SECONDS)
        yield


def tail(log: Path, lines: int = 15) -> str:
    """Last lines of a log file, without blank ones."""
    if not log.exists():
        return ""
    text = log.read_bytes()[-20_000:].decode(errors="replace")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
