"""What an instance keeps between two batches, and what it shares with others."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import redis

from components.config import RecallConfig
from components.local.processes import HOST
from components.memory import trim_memory
from components.recall.intake import feed
from components.recall.launch import run_instances
from components.recall.worker import RecallWorker
from components.release.rollout import Publication, roll_out
from components.settings import Settings
from tests.components.recall.conftest import Release, StartWorker, make_event, wait_until

MIB = 2**20
# Load a release and read a history as an instance does, after the imports of the fork server.
SERVE = """
import sys
import components.cli, components.recall.preload
before = set(sys.modules)
from pathlib import Path
from components.config import ReleaseConfig
from components.recall.engine import load_release
from components.release.rollout import Publication
from components.settings import Settings
release = load_release(
    Publication(release=sys.argv[1], bundle=sys.argv[2], order=1),
    Settings(home=Path(sys.argv[3]), device="cpu", num_threads=1),
    ReleaseConfig(),
)
release.read_histories(["1"])
print("late:", *sorted(set(sys.modules) - before))
"""

# MiB that a process keeps of 300 products of bfloat16 matrices, none of the shape of another.
MULTIPLY = """
import sys
from components.memory import keep_no_products
if sys.argv[1] == "none":
    keep_no_products()
import psutil, torch
torch.set_num_threads(1)
weights = torch.ones(576, 1736, dtype=torch.bfloat16)
torch.ones(99, 576, dtype=torch.bfloat16) @ weights
before = psutil.Process().memory_info().rss
for rows in range(100, 400):
    torch.ones(rows, 576, dtype=torch.bfloat16) @ weights
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


def resident() -> float:
    return float(psutil.Process().memory_info().rss) / MIB


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(64 * 1024) for _ in range(1024)]
    for block in blocks:
        ctypes.memset(block, 1, 64 * 1024)
    last = libc.malloc(64 * 1024)  # keeps glibc from giving back the end of the heap by itself
    for block in blocks:
        libc.free(block)
    before = resident()
    trim_memory()
    libc.free(last)
    assert before - resident() > 48


def test_products_of_many_shapes_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(variable, raising=False)
    kept = {
        how: float(subprocess.run([sys.executable, "-c", MULTIPLY, how], check=True, stdout=subprocess.PIPE).stdout)
        for how in ("all", "none")
    }
    if kept["all"] < 50:  # seen, not asked: other CPUs than those that name bfloat16 may go through oneDNN as well
        pytest.skip("this CPU multiplies bfloat16 without oneDNN")
    assert kept["none"] < 20


def test_what_instances_inherit_limits_the_products_before_the_fork_server_imports_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Prepared(Exception):
        """Ends the start."""

    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("components.recall.launch.prepare", Mock(side_effect=Prepared))
    with pytest.raises(Prepared):
        run_instances(Settings(home=tmp_path), [], 1, 0, HOST, 0, 60.0)
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "0" and environment["LRU_CACHE_CAPACITY"] == "1"


def test_memory_is_given_back_after_a_release_is_loaded_and_after_each_batch(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    recall_config: RecallConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trimmed: list[str] = []
    monkeypatch.setattr("components.recall.switch.trim_memory", lambda: trimmed.append("release"))
    monkeypatch.setattr("components.recall.worker.trim_memory", lambda: trimmed.append("batch"))
    start_worker()
    roll_out(client, releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    expected = ["release"]
    for number in (1, 2):
        feed(client, iter([make_event(f"user{number}", event_id=f"{number}")]), recall_config)
        expected.append("batch")
        wait_until(lambda: trimmed == expected)


def test_the_thread_that_loaded_a_release_ends(promoted: tuple[RecallWorker, Publication]) -> None:
    wait_until(lambda: not any(thread.name.startswith("release") for thread in threading.enumerate()))


def test_an_instance_imports_nothing_heavy_after_the_fork(releases: tuple[Release, Release]) -> None:
    release = releases[0]
    done = subprocess.run(
        [sys.executable, "-c", SERVE, release.name, str(release.bundle), str(release.settings.home)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    late = done.stdout.split("late:")[1].split()
    packages = {name.split(".")[0] for name in late}
    assert packages.isdisjoint({"ibis", "pyarrow", "pandas", "torch", "aiobotocore", "aiohttp"}), late
