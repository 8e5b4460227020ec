"""torchrun's exit code, with real processes."""

import os
import signal
import subprocess
import sys

import pytest

from tests.worlds import REPOSITORY, run_python, wait_until

WORKER = """
import os, signal, sys, time
rank, how = os.environ["RANK"], sys.argv[1]
if rank == "1" and how.isdigit():
    sys.exit(int(how))
if rank == "1" and how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print("started", flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
time.sleep(0 if how == "0" else 60)
"""
LAUNCH = ("-m", "components.torchrun", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(("how", "code"), [("0", 0), ("2", 2), ("3", 3), ("killed", 137)])
def test_it_ends_as_the_process_that_failed_first(how, code, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    done = run_python(*LAUNCH, tmp_path / "worker.py", how, timeout=60)
    assert done.returncode == code, done.stderr


def test_sigterm_reaches_the_processes_and_is_told(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    out = tmp_path / "out"
    command = [sys.executable, *LAUNCH, tmp_path / "worker.py", "wait"]
    with out.open("w") as stream:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ, stdout=stream)
        wait_until(lambda: out.read_text().count("started") == 2, 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert out.read_text().count("saved") == 2
