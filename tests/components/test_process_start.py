import os
import subprocess
import sys

import psutil
import pytest

from components.process_start import ticks_at_start


def test_a_start_is_that_of_the_process_and_stays_the_same() -> None:
    mine = ticks_at_start(os.getpid())
    assert mine is not None and mine == ticks_at_start(os.getpid())
    age = psutil.Process().create_time() - psutil.boot_time()
    assert mine / os.sysconf("SC_CLK_TCK") == pytest.approx(age, abs=2)


def test_a_process_that_is_gone_has_none() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        began = ticks_at_start(child.pid)
        child.communicate(b"\n")
    assert began is not None and began >= (ticks_at_start(os.getpid()) or 0)
    assert ticks_at_start(child.pid) is None
