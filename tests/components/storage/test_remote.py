import fcntl
import platform
from pathlib import Path

import fsspec
import pytest

from components.config import load_config
from components.exceptions import ConfigError, DataError, UnavailableError
from components.settings import Settings
from components.storage import StageReport, StageRun, load_result
from tests.worlds.stages import CONFIG, Run, Work


def test_a_remote_store_holds_a_run(tmp_path: Path, run: Run, memory: str) -> None:
    work = Work("far away")
    first = run("ingest", work, f"{memory}/a")
    assert first.outputs["items"] == f"memory://runs/a/ingest/{first.fingerprint[:16]}/items.txt"

    def validate(stage: StageRun) -> StageReport:
        assert stage.path("ingest", "items").read_text() == "far away"
        assert (stage.path("ingest", "events") / "part.txt").read_text() == "far away"
        stage.report_progress("checking")
        (stage.output / "deep" / "er").mkdir(parents=True)
        (stage.output / "deep" / "er" / "x.txt").write_text("deep")
        return StageReport(outputs={"deep": "deep"})

    second = run("validate", validate, f"{memory}/a")
    with fsspec.open(second.outputs["deep"] + "/er/x.txt", "r") as stream:
        assert stream.read() == "deep"
    assert load_result(f"{memory}/a", "validate") == second

    third = run("ingest", work, f"{memory}/b")
    assert len(work.runs) == 1
    assert third.reused_from == "memory://runs/a/ingest/result.json"


def test_a_forced_result_of_a_remote_store_is_not_mistaken_for_a_fetched_one(run: Run, memory: str) -> None:
    def read(stage: StageRun) -> StageReport:
        return StageReport(metrics={"content": stage.path("ingest", "items").read_text()})

    def content() -> str:
        return str(run("validate", read, f"{memory}/a").metrics["content"])

    run("ingest", Work("old"), f"{memory}/a")
    assert content() == "old"
    run("ingest", Work("new"), f"{memory}/a", force=True)
    assert content() == "new"


def test_work_done_again_in_a_remote_store_is_not_mistaken_for_a_fetched_one(run: Run, memory: str) -> None:
    """Files that a rule of the store removed are made again: equal work, and another result."""

    def read(stage: StageRun) -> StageReport:
        return StageReport(metrics={"content": stage.path("ingest", "items").read_text()})

    first = run("ingest", Work("old"), f"{memory}/a")
    assert run("validate", read, f"{memory}/a").metrics == {"content": "old"}
    fsspec.filesystem("memory").rm_file(first.outputs["items"])
    with pytest.raises(ZeroDivisionError):
        run("ingest", lambda _: 1 / 0, f"{memory}/a")  # an attempt in between that is killed
    again = run("ingest", Work("new"), f"{memory}/a")
    assert again.fingerprint == first.fingerprint
    assert run("validate", read, f"{memory}/a").metrics == {"content": "new"}


def test_a_failed_attempt_leaves_a_remote_store_clean(run: Run, memory: str) -> None:
    def fail(stage: StageRun) -> StageReport:
        (stage.output / "half").write_text("")
        raise DataError("log", expected="rows", got="none", remedy="check the source")

    with pytest.raises(DataError):
        run("ingest", fail, f"{memory}/a")
    assert fsspec.filesystem("memory").find("/runs/a") == []
    run("ingest", Work(), f"{memory}/a")


def test_an_attempt_that_another_one_replaced_ends_and_changes_nothing(run: Run, memory: str) -> None:
    """A pod on a node that nobody reaches goes on beside its successor."""

    def orphan(stage: StageRun) -> StageReport:
        assert stage.is_current()
        (stage.output / "items.txt").write_text("of the orphan")
        with fsspec.open(f"{memory}/a/ingest/.attempt", "w") as note:
            note.write("the successor")
        assert not stage.is_current()
        return StageReport(outputs={"items": "items.txt"})

    with pytest.raises(UnavailableError, match=r"stage folder memory://.*: expected one attempt at a time, got ano"):
        run("ingest", orphan, f"{memory}/a")
    assert fsspec.filesystem("memory").find("/runs/a") == ["/runs/a/ingest/.attempt"]

    # The orphan may write to its folder whenever it likes: the successor has another one.
    result = run("ingest", Work("of the successor"), f"{memory}/a")
    assert result.outputs["items"].startswith(f"{memory}/a/ingest/{result.fingerprint[:16]}-")
    assert not fsspec.filesystem("memory").exists("/runs/a/ingest/.attempt")


def test_a_shared_cache_is_cleared_of_dead_attempts_and_no_others(run: Run, settings: Settings, memory: str) -> None:
    def work(stage: StageRun) -> StageReport:
        for name in ("dead", "alive"):
            (stage.scratch.parents[1] / name / ".scratch-0").mkdir(parents=True)
            (stage.scratch.parents[1] / name / ".lock").touch()
        return StageReport(metrics={"x": 1})

    def look(stage: StageRun) -> StageReport:
        return StageReport(metrics={"machines": sorted(path.name for path in stage.scratch.parents[1].iterdir())})

    run("ingest", work, f"{memory}/a")
    (alive,) = settings.cache_path.glob("work/*/ingest/alive")
    with (alive / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run("ingest", look, f"{memory}/a", force=True)
    assert result.metrics["machines"] == sorted(["alive", platform.node()])


def test_checkpoints_in_a_store_outlive_a_failure_and_go_after_success(run: Run, memory: str) -> None:
    store = fsspec.filesystem("memory")

    def keep(stage: StageRun) -> None:
        store.pipe_file(f"{stage.checkpoints.removeprefix('memory:/')}/checkpoint-3/budget.json", b"{}")

    def fail(stage: StageRun) -> StageReport:
        keep(stage)
        raise DataError("log", expected="rows", got="none", remedy="check the source")

    def work(stage: StageRun) -> StageReport:
        assert stage.lasting == stage.checkpoints
        assert store.exists(f"{stage.checkpoints.removeprefix('memory:/')}/checkpoint-3/budget.json")
        return StageReport(metrics={"x": 1})

    other = load_config(CONFIG, {"seed": 1})
    for config in (None, other):
        with pytest.raises(DataError):
            run("ingest", fail, f"{memory}/a", **({"config": config} if config else {}))
    assert len(store.find("/runs/a")) == 2
    run("ingest", work, f"{memory}/a")
    assert [path.rsplit("/", 1)[1] for path in store.find("/runs/a")] == ["result.json"]


def test_a_store_nobody_knows(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"address nosuch://x/.*: expected a local path or a store that fsspec can"):
        run("ingest", Work(), "nosuch://x/run")
