"""What an instance keeps between two batches, and what it shares with others."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import redis

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.local.processes import HOST
from components.recall.operate.intake import feed
from components.recall.process.launch import run_backfill, run_instances, run_worker
from components.recall.worker.stream import RecallWorker
from components.release.publication import Publication
from components.settings import Settings
from tests.worlds import REPOSITORY
from tests.worlds.recall import Release, StartWorker, make_event, wait_until
from tests.worlds.tiny import make_config

# Load a release and read a history as an instance does, after the imports of the fork server.
SERVE = """
import sys
import components.cli.app, components.recall.process.preload
before = set(sys.modules)
from pathlib import Path
from components.config import ReleaseConfig
from components.recall.serving.engine import load_release
from components.deploy.workers import Publication
from components.settings import Settings
release = load_release(
    Publication(release=sys.argv[1], bundle=sys.argv[2], order=1),
    Settings(home=Path(sys.argv[3]), device="cpu", num_threads=1),
    ReleaseConfig(),
)
release.read_histories(["1"])
print("late:", *sorted(set(sys.modules) - before))
"""


def test_what_instances_inherit_limits_the_products_before_the_fork_server_imports_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Prepared(Exception):
        """Ends the start."""

    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("components.recall.process.launch.prepare", Mock(side_effect=Prepared))
    with pytest.raises(Prepared):
        run_instances(Settings(home=tmp_path), [], 1, 0, HOST, 0, 60.0)
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "0" and environment["LRU_CACHE_CAPACITY"] == "1"


@pytest.mark.parametrize(("kind", "niceness"), [("worker", 10), ("ad-hoc", 0), ("back-fill", 19)])
def test_what_can_wait_has_the_lower_priority(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, niceness: int
) -> None:
    """Reads come before events, events before back-fill; before there are threads, which would keep theirs."""

    class Lowered(Exception):
        """Ends the start."""

    nice = Mock(side_effect=Lowered)
    monkeypatch.setattr("components.recall.process.launch.os.nice", nice)
    settings, config = Settings(home=tmp_path), make_config()
    with pytest.raises(Lowered):
        if kind == "back-fill":
            run_backfill(settings, config, 0, 1, 0, HOST, 0)
        else:
            run_worker(settings, config, HOST, 0, ad_hoc=kind == "ad-hoc")
    nice.assert_called_once_with(niceness)


def test_memory_is_given_back_after_a_release_is_loaded_and_after_each_batch(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    recall_config: RecallConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trimmed: list[str] = []
    monkeypatch.setattr("components.recall.worker.switch.trim_memory", lambda: trimmed.append("release"))
    monkeypatch.setattr("components.recall.worker.stream.trim_memory", lambda: trimmed.append("batch"))
    start_worker()
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
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
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    late = done.stdout.split("late:")[1].split()
    packages = {name.split(".")[0] for name in late}
    assert packages.isdisjoint({"ibis", "pyarrow", "pandas", "torch", "aiobotocore", "aiohttp"}), late
