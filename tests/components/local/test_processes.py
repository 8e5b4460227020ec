import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from components.exceptions import UnavailableError
from components.local.processes import (
    ProcessRecord,
    choose_port,
    find,
    memory_bytes,
    ports_reserved,
    run_to_end,
    spawn,
    stop,
    tail,
)
from tests.worlds import wait_until

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")
# Starts a child in a session of its own, as an Airflow worker does with a stage, and ignores SIGTERM.
STUBBORN_SCRIPT = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
STUBBORN = (sys.executable, "-c", STUBBORN_SCRIPT)


@pytest.fixture
def start(tmp_path):
    records = []

    def run(command, **environment):
        record = spawn(command, environment=environment, log=tmp_path / "out.log", folder=tmp_path)
        records.append(record)
        return record

    yield run
    stop(records, grace_seconds=0.2)


def test_a_process_gets_environment_folder_and_log(tmp_path):
    script = "import os; print(os.environ['URM_HOME'], os.getcwd(), 'PATH' in os.environ)"
    log = tmp_path / "logs" / "out.log"
    command = (sys.executable, "-c", script)
    assert run_to_end(command, environment={"URM_HOME": "here"}, log=log, folder=tmp_path) == 0
    assert log.read_text().split() == ["here", str(tmp_path), "False"]


def test_exit_code_of_a_program_that_fails(tmp_path):
    command = (sys.executable, "-c", "raise SystemExit(7)")
    assert run_to_end(command, environment={}, log=tmp_path / "out.log", folder=tmp_path) == 7


def test_a_missing_program_is_one_sentence(tmp_path):
    with pytest.raises(UnavailableError, match=r"program /no/such/program: .* got No such file"):
        spawn(("/no/such/program",), environment={}, log=tmp_path / "out.log", folder=tmp_path)


def test_find_sees_a_live_process_and_not_a_dead_one(start):
    record = start(SLEEP)
    assert find(record).pid == record.pid
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: find(record) is None)


def test_a_process_is_found_after_the_clock_was_set(start, monkeypatch):
    """Its start, by the wall clock, moves with the clock."""
    record = start(SLEEP)
    began = psutil.Process(record.pid).create_time()
    boot = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 3600)
    assert psutil.Process(record.pid).create_time() > began + 3000
    assert find(record).pid == record.pid


def test_another_process_with_the_same_id_is_not_ours():
    """After a reboot a recorded id may belong to anything."""
    stale = ProcessRecord(pid=os.getpid(), started="a boot before 4711")
    assert find(stale) is None
    stop([stale], grace_seconds=0.1)
    assert psutil.pid_exists(os.getpid())


def test_stop_ends_a_tree_that_ignores_sigterm(start, tmp_path):
    record = start(STUBBORN)
    log = tmp_path / "out.log"
    wait_until(lambda: log.read_text().strip())
    child = int(log.read_text())
    stop([record], grace_seconds=0.3)
    assert find(record) is None
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_stop_of_a_process_that_is_gone_does_nothing(start):
    record = start((sys.executable, "-c", "pass"))
    wait_until(lambda: find(record) is None)
    stop([record], grace_seconds=0.1)


def test_memory_counts_the_process(start):
    record = start(SLEEP)
    wait_until(lambda: memory_bytes(record) > 1 << 20)  # right after the fork it shares everything
    assert memory_bytes(record) < 1 << 30


def test_a_port_in_use_is_passed_over():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken: set[int] = set()
        port = choose_port(busy.getsockname()[1], taken=taken)
        assert port != busy.getsockname()[1]
        assert taken == {port}


def test_a_promised_port_is_passed_over():
    first = choose_port(taken=(taken := set()))
    assert choose_port(first, taken=taken) != first


def test_ports_are_reserved_until_their_process_ends():
    code = "import time; from components.local.processes import ports_reserved\n"
    code += "with ports_reserved(print):\n    print('mine', flush=True)\n    time.sleep(600)"
    said = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        while other.stdout.readline() != b"mine\n":  # another test may have them
            assert other.poll() is None
        with pytest.raises(UnavailableError, match="other services that start on this machine"):
            with ports_reserved(said.append, timeout_seconds=0.1):
                pass
        assert said == ["waiting for other services that start on this machine"]
        other.kill()
    with ports_reserved(said.append):
        pass


def test_tail(tmp_path):
    log = tmp_path / "a.log"
    assert tail(log) == ""
    log.write_text("\n".join(["one", "", "two", "three"]))
    assert tail(log, lines=2) == "two\nthree"
