"""Processes that share what they have in common: forked from one that has imported it, before it makes a thread.

Python's fork server does the forking; what it imports (preload.py) is in memory once, whatever the number of processes.
A process that has run anything in parallel must not be forked, so that neither the supervisor nor an instance is; and
what comes after the fork (a release) is shared by memory-mapping its files.

A process ends as by SIGTERM when the one that started it is gone, however that ended.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process

from components.exceptions import UrmError

Program = tuple[Callable[..., object], tuple[object, ...]]

_forks = multiprocessing.get_context("forkserver")


def prepare() -> None:
    """Import what workers need; takes seconds, so that `start` takes none. Without it a process starts bare."""
    _forks.set_forkserver_preload(["components.cli.app", "components.recall.process.preload"])
    first = _forks.Process(target=gc.isenabled, name="first")  # anything that ends at once
    first.start()
    first.join()


def start(program: Program, cores: frozenset[int], name: str) -> tuple[BaseProcess, Connection]:
    """Run a function in a forked process; also gives the end of a pipe for `read_sentence`.

    Args:
        program: The function, which a module must have at its top level, and its arguments.
        cores: On which it and all of its threads may run.
        name: Of the process.
    """
    receiver, sender = _forks.Pipe(duplex=False)
    with sender:  # the process has one of its own
        process = _forks.Process(target=_run, args=(program, cores, sender), name=name)
        process.start()
    return process, receiver


def read_sentence(receiver: Connection) -> str:
    """The sentence of the error on purpose that ended a process; empty if none did."""
    with receiver:
        try:
            return str(receiver.recv())
        except EOFError:
            return ""


def run_urm(arguments: Sequence[str]) -> None:
    """Be `urm` with these arguments."""
    sys.argv = ["urm", *arguments]
    runpy.run_module("components", run_name="__main__", alter_sys=True)


def _run(program: Program, cores: frozenset[int], sender: Connection) -> None:
    os.sched_setaffinity(0, cores)  # before it has made a thread, so that all of them inherit it
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    function, arguments = program
    try:
        function(*arguments)
    except SystemExit as end:  # `urm` has printed it
        if isinstance(end.__cause__, UrmError):
            sender.send(str(end.__cause__))
        raise


def _end_with_parent() -> None:
    # The system's own signal for this (PR_SET_PDEATHSIG) would tell of the fork server, which lives as long as any
    # process it has forked.
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
