"""Real processes: what becomes of a command when the process that runs it is told to end, or is killed."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from components.child_process import run
from tests.worlds import REPOSITORY, wait_until

# Says who it is, and leaves a file when it is told to end, for which it takes a moment.
CHILD = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "pid.new").write_text(str(os.getpid()))
pathlib.Path(sys.argv[1], "pid.new").rename(pathlib.Path(sys.argv[1], "pid"))
time.sleep(60)
"""
PARENT = f"""
import sys
from components.child_process import run
from components.cli.app import end_on_sigterm
end_on_sigterm()
run([sys.executable, "-c", {CHILD!r}, sys.argv[1]])
"""


def start(folder: Path) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A process that runs a command, and the command's own."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], cwd=REPOSITORY)
    wait_until((folder / "pid").exists, 60)
    return parent, psutil.Process(int((folder / "pid").read_text()))


def test_the_exit_code_is_that_of_the_command() -> None:
    assert run([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_a_command_has_time_to_save_when_its_parent_is_told_to_end(tmp_path: Path) -> None:
    parent, child = start(tmp_path)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 143
    assert (tmp_path / "saved").exists() and not child.is_running()


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs util-linux")
def test_a_command_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent, child = start(tmp_path)
    parent.kill()
    parent.wait(30)
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 30)
    assert not (tmp_path / "saved").exists()
