"""A process that has imported the runtime and forks workers and APIs from it, each ready in a fraction of a second.

What it forks are real processes: `urm recall …` with its own arguments, environment and log, to be killed like any
other. It has no Python threads when it forks. Orders and answers are lines of JSON on its standard input and output.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.injection import Fault
from tests.worlds import REPOSITORY
from tests.worlds.recall import Release


class Zygote:
    """The test's end of it."""

    def __init__(self, release: Release) -> None:
        """Start it; what loading this release imports will be there in all that it forks."""
        self._home = str(release.settings.home)
        environment = {"OMP_NUM_THREADS": "1", "URM_DEVICE": "cpu", "URM_NUM_THREADS": "1", "URM_HOME": self._home}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", release.name, str(release.bundle)],
            cwd=REPOSITORY,
            env={"PATH": "/usr/bin:/bin", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()

    def start(self, arguments: list[str], environment: dict[str, str], log: Path, fault: Fault | None = None) -> int:
        """Fork `urm <arguments>`; its process id."""
        order = {"arguments": arguments, "environment": environment, "log": str(log), "fault": asdict(fault or Fault())}
        return self._ask(order)

    def wait(self, pid: int) -> int:
        """Exit code of an ended or ending process; -9 if it was killed."""
        return self._ask({"wait": pid})

    def close(self) -> None:
        """Kill what it has forked, and end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())


def main() -> None:
    """Obey until standard input ends."""
    _warm_up(*sys.argv[1:])
    running: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            running.discard(order["wait"])
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(_become(order))
        running.add(pid)
        print(pid, flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _warm_up(release: str, bundle: str) -> None:
    """Import what `urm recall worker` and `serve` import when they start, and what loading a release does."""
    import tqdm
    import uvicorn  # noqa: F401  # imported to be there after the fork

    from components.config import ReleaseConfig
    from components.recall.serving.engine import load_release
    from components.release.publication import Publication
    from components.settings import Settings

    tqdm.tqdm.monitor_interval = 0  # else it starts a thread
    with contextlib.redirect_stdout(sys.stderr):
        publication = Publication(release=release, bundle=bundle, order=0)
        load_release(publication, Settings(), ReleaseConfig()).read_histories(["0"])
    assert threading.active_count() == 1


def _become(order: dict[str, Any]) -> int:
    """Be `urm <arguments>` in this process; its exit code."""
    from components.cli.app import run_app
    from tests.faults.injection import inject

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for own, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(own, number)
    os.environ.update(order["environment"])
    sys.argv = ["urm", *order["arguments"]]
    code: Any = 0
    try:
        inject(Fault(**order["fault"]))
        run_app()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # a forked process must not go on as the zygote
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


if __name__ == "__main__":
    main()
