import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from components.config import load_config
from components.exceptions import ConfigError, DataError, MissingInputError, UnavailableError
from components.flow import STAGES
from components.settings import Settings
from components.storage import StageReport, StageRun, fingerprint, load_result, run_stage
from tests.worlds import REPOSITORY
from tests.worlds.disks import fill, mount_small_disk  # noqa: F401  # fixture
from tests.worlds.stages import CONFIG, Run, Work


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_result_says_what_is_where(tmp_path: Path, run: Run) -> None:
    result = run("ingest", Work(), tmp_path / "run")
    print_ = result.fingerprint[:16]
    written = {f"ingest/{print_}/{name}" for name in ("items.txt", "events/part.txt")}
    assert files(tmp_path / "run") == {"ingest/result.json"} | written
    assert result.outputs == {
        "events": f"{tmp_path}/run/ingest/{print_}/events",
        "items": f"{tmp_path}/run/ingest/{print_}/items.txt",
    }
    assert (result.counts, result.metrics) == ({"events": 3}, {"share": 0.5})
    assert load_result(str(tmp_path / "run"), "ingest") == result
    assert result.started_at <= result.finished_at


def test_running_again_computes_nothing(tmp_path: Path, run: Run) -> None:
    work = Work()
    first = run("ingest", work, tmp_path / "run")
    assert run("ingest", work, tmp_path / "run") == first
    assert len(work.runs) == 1


def test_another_run_reuses_equal_work(tmp_path: Path, run: Run) -> None:
    work = Work()
    first = run("ingest", work, tmp_path / "a")
    second = run("ingest", work, tmp_path / "b")
    assert len(work.runs) == 1
    assert second.outputs == first.outputs
    assert second.reused_from == f"{tmp_path}/a/ingest/result.json"
    assert load_result(str(tmp_path / "b"), "ingest") == second


def test_going_back_to_an_earlier_configuration_reuses_its_work(tmp_path: Path, run: Run) -> None:
    work = Work()
    first = run("ingest", work, tmp_path / "run")
    run("ingest", work, tmp_path / "run", load_config(CONFIG, {"source.max_users": 5}))
    again = run("ingest", work, tmp_path / "run")
    assert len(work.runs) == 2
    assert again.outputs == first.outputs


def test_work_whose_files_are_gone_is_done_again(tmp_path: Path, run: Run) -> None:
    work = Work()
    first = run("ingest", work, tmp_path / "a")
    Path(first.outputs["items"]).unlink()
    second = run("ingest", work, tmp_path / "b")
    assert len(work.runs) == 2
    assert second.reused_from is None


def test_force_computes_and_leaves_the_files_other_runs_use(tmp_path: Path, run: Run) -> None:
    run("ingest", Work("old"), tmp_path / "a")
    other = run("ingest", Work(), tmp_path / "b")
    forced = run("ingest", Work("new"), tmp_path / "a", force=True)
    assert Path(forced.outputs["items"]).read_text() == "new"
    assert Path(other.outputs["items"]).read_text() == "old"


@pytest.mark.parametrize("force", [True, False], ids=["forced", "files_gone"])
def test_what_read_another_result_of_equal_work_is_done_again(force: bool, tmp_path: Path, run: Run) -> None:
    """Trainings end by the clock: equal work may leave another model, which no earlier verdict is about."""

    def judge(stage: StageRun) -> StageReport:
        return StageReport(metrics={"about": stage.path("ingest", "items").read_text()})

    first = run("ingest", Work("old"), tmp_path / "a")
    assert run("validate", judge, tmp_path / "a").metrics == {"about": "old"}
    run("ingest", Work("new"), tmp_path / "b")  # reused there
    assert run("validate", judge, tmp_path / "b").reused_from == f"{tmp_path}/a/validate/result.json"
    if not force:
        Path(first.outputs["items"]).unlink()
    second = run("ingest", Work("new"), tmp_path / "a", force=force)
    assert second.fingerprint == first.fingerprint
    assert run("validate", judge, tmp_path / "a").metrics == {"about": "new"}


def test_what_was_made_by_other_settings_is_not_read(tmp_path: Path, run: Run) -> None:
    """A configuration that was edited, or forgotten on the command line, after some of the stages."""
    run("ingest", Work(), tmp_path / "run")
    run("validate", Work(), tmp_path / "run")
    done = run("features", Nothing("features"), tmp_path / "run")
    other = load_config(CONFIG, {"source.max_users": 5})
    with pytest.raises(
        ConfigError, match=r"stage features: expected the settings of source, seed by which 'ingest' ran in"
    ):
        run("features", Work(), tmp_path / "run", other)
    assert load_result(str(tmp_path / "run"), "features") == done  # nothing was touched
    changed = load_config(CONFIG, {"features.history_length": 16})
    assert run("features", Nothing("features"), tmp_path / "run", changed).fingerprint != done.fingerprint
    with pytest.raises(
        ConfigError, match=r"stage sft: .* by which 'features' ran in .* run `urm features` and what follows"
    ):
        run("encode", Nothing("encode"), tmp_path / "run")
        run("sft", Work(), tmp_path / "run")
    older = tmp_path / "run" / "features" / "result.json"  # by a version that did not say
    older.write_text(
        json.dumps({name: value for name, value in json.loads(older.read_text()).items() if name != "made_with"})
    )
    run("sft", Nothing("sft"), tmp_path / "run")


class Nothing:
    """A stage that leaves what its table in the flow promises, empty."""

    def __init__(self, stage: str) -> None:
        self.names = STAGES[stage].outputs

    def __call__(self, stage: StageRun) -> StageReport:
        for name in self.names:
            (stage.output / name).touch()
        return StageReport(outputs={name: name for name in self.names})


def test_a_stage_acting_on_the_world_is_never_reused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name, spec in STAGES.items() if not spec.reusable} == {"release", "promote"}
    monkeypatch.setitem(STAGES, "ingest", replace(STAGES["ingest"], reusable=False))
    old, new = Work("old"), Work("new")
    first = run("ingest", old, tmp_path / "run")
    second = run("ingest", new, tmp_path / "run")
    assert (len(old.runs), len(new.runs)) == (1, 1)
    # What was released may be at work, so that it stays where it is.
    assert [Path(result.outputs["items"]).read_text() for result in (first, second)] == ["old", "new"]
    assert [run.folder for run in (*old.runs, *new.runs)] == [
        str(Path(result.outputs["items"]).parent) for result in (first, second)
    ]


def test_inputs_are_read_through_the_contract(tmp_path: Path, run: Run) -> None:
    run("ingest", Work("from ingest"), tmp_path / "run")

    def validate(stage: StageRun) -> StageReport:
        (stage.output / "items.txt").write_text(stage.path("ingest", "items").read_text().upper())
        return StageReport(outputs={"items": "items.txt"})

    result = run("validate", validate, tmp_path / "run")
    assert Path(result.outputs["items"]).read_text() == "FROM INGEST"

    def greedy(stage: StageRun) -> StageReport:
        stage.path("ingest", "prices")
        return StageReport()

    with pytest.raises(MissingInputError, match="stage validate: expected output 'prices' of stage 'ingest', got none"):
        run("validate", greedy, tmp_path / "run", force=True)


def test_a_stage_whose_input_is_missing(tmp_path: Path, run: Run) -> None:
    work = Work()
    message = r"validate: expected the result of stage 'ingest' in .*/run, got none; run `urm ingest` with the same"
    with pytest.raises(MissingInputError, match=message):
        run("validate", work, tmp_path / "run")
    assert work.runs == []


def test_inputs_removed_by_hand_are_named(tmp_path: Path, run: Run) -> None:
    first = run("ingest", Work(), tmp_path / "run")
    Path(first.outputs["items"]).unlink()

    def validate(stage: StageRun) -> StageReport:
        stage.path("ingest", "items")
        return StageReport()

    with pytest.raises(MissingInputError, match=r"input .*items\.txt: expected a file or folder, got nothing"):
        run("validate", validate, tmp_path / "run")


def test_another_gate_policy_judges_the_same_models() -> None:
    def prints(overrides: dict[str, object]) -> dict[str, str]:
        changed = load_config(CONFIG, overrides)
        return {name: fingerprint(STAGES[name], changed, {}, {}) for name in ("baseline", "sft", "evaluate", "gate")}

    base = prints({})
    policy, cut_off = prints({"evaluation.gate.min_tasks_won": 2}), prints({"evaluation.k": 7})
    assert {name for name in base if policy[name] != base[name]} == {"gate"}
    assert {name for name in base if cut_off[name] != base[name]} == set(base)


def test_a_failed_stage_leaves_nothing_but_its_scratch(tmp_path: Path, run: Run) -> None:
    run("ingest", Work("old"), tmp_path / "run")

    def fail(stage: StageRun) -> StageReport:
        (stage.output / "half").write_text("")
        (stage.scratch / "checkpoint").write_text("step 7")
        raise DataError("log", expected="rows", got="none", remedy="check the source")

    changed = load_config(CONFIG, {"source.max_users": 5})
    with pytest.raises(DataError):
        run("ingest", fail, tmp_path / "run", changed)
    assert load_result(str(tmp_path / "run"), "ingest") is None  # the old result does not answer for the new work
    assert not list((tmp_path / "run").rglob("half"))

    def resume(stage: StageRun) -> StageReport:
        assert (stage.scratch / "checkpoint").read_text() == "step 7"
        assert list(stage.output.iterdir()) == []
        return StageReport()

    run("ingest", resume, tmp_path / "run", changed)
    assert not list((tmp_path / "run").rglob("checkpoint"))


KILLED = """
    import sys, time
    from pathlib import Path
    from components.config import load_config
    from components.settings import Settings
    from components.storage import StageReport, run_stage

    def work(stage):
        (stage.output / "items.txt").write_text("half")
        (stage.scratch / "checkpoint").write_text("step 7")
        print("working", flush=True)
        time.sleep(60)
        return StageReport(outputs={"items": "items.txt"})

    run_stage("ingest", work, config=load_config(sys.argv[1]), run_dir=sys.argv[2], settings=Settings(home=sys.argv[3]))
"""


@pytest.fixture
def working(tmp_path: Path, settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of the ingest stage of <tmp>/run."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), CONFIG, tmp_path / "run", settings.home]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "working\n":
                break
        yield process
        process.kill()


def test_a_killed_stage_leaves_nothing_that_counts_and_a_second_attempt_succeeds(
    tmp_path: Path, run: Run, working: subprocess.Popen[str]
) -> None:
    working.send_signal(signal.SIGKILL)
    working.wait()
    assert load_result(str(tmp_path / "run"), "ingest") is None
    assert len(list((tmp_path / "run").rglob("items.txt"))) == 1  # the torn output, in its temporary folder

    seen: list[str] = []

    def work(stage: StageRun) -> StageReport:
        seen.append((stage.scratch / "checkpoint").read_text())
        return Work()(stage)

    result = run("ingest", work, tmp_path / "run")
    assert seen == ["step 7"]
    written = {f"ingest/{result.fingerprint[:16]}/{name}" for name in ("items.txt", "events/part.txt")}
    assert files(tmp_path / "run") == {"ingest/result.json"} | written
    assert [path.name for path in (tmp_path / "run" / "ingest").glob(".*")] == [".lock"]


def test_two_attempts_at_once_do_not_spoil_each_other(tmp_path: Path, run: Run, working: subprocess.Popen[str]) -> None:
    with pytest.raises(UnavailableError, match=r"stage folder .*/run/ingest: expected one attempt at a time"):
        run("ingest", Work(), tmp_path / "run")
    assert working.poll() is None
    assert len(list((tmp_path / "run").rglob("items.txt"))) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"stage": "ingest"}', ""])
def test_a_damaged_result_of_an_input_is_named(tmp_path: Path, run: Run, content: str) -> None:
    run("ingest", Work(), tmp_path / "run")
    (tmp_path / "run" / "ingest" / "result.json").write_text(content)
    with pytest.raises(DataError, match=r"/run/ingest/result\.json: expected .*; delete it and run the stage again"):
        run("validate", Work(), tmp_path / "run")


def test_a_damaged_result_of_its_own_is_replaced(tmp_path: Path, run: Run) -> None:
    work = Work()
    first = run("ingest", work, tmp_path / "run")
    for path in (tmp_path / ".stages").rglob("*.json"):
        path.write_text("{")
    (tmp_path / "run" / "ingest" / "result.json").write_text('{"stage"')
    with capture_logs() as logs:
        second = run("ingest", work, tmp_path / "run")
    assert len(work.runs) == 2
    assert second.outputs == first.outputs
    assert load_result(str(tmp_path / "run"), "ingest") == second
    assert {entry["event"] for entry in logs if entry["log_level"] == "warning"} == {
        "earlier result is damaged, not used"
    }


def test_a_run_directory_that_cannot_be_made(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")
    message = r"run directory .*/file/run/ingest: expected a folder that can be written, got Not a directory; choose"
    with pytest.raises(DataError, match=message):
        run("ingest", Work(), tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_directory_that_is_read_only(tmp_path: Path, run: Run) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="expected a folder that can be written, got Permission denied"):
        run("ingest", Work(), tmp_path / "locked" / "run")


def test_an_index_that_cannot_be_written_costs_no_result(tmp_path: Path, run: Run) -> None:
    (tmp_path / ".stages").write_text("in the way")
    with capture_logs() as logs:
        result = run("ingest", Work(), tmp_path / "run")
    assert load_result(str(tmp_path / "run"), "ingest") == result
    assert "result is not in the index of runs" in {entry["event"] for entry in logs}


def test_a_stage_that_promises_files_it_did_not_write(tmp_path: Path, run: Run) -> None:
    with pytest.raises(FileNotFoundError, match="stage ingest reports output 'x' but wrote no y"):
        run("ingest", lambda stage: StageReport(outputs={"x": "y"}), tmp_path / "run")
    assert load_result(str(tmp_path / "run"), "ingest") is None


def test_the_previous_result_of_the_source_is_handed_over(tmp_path: Path, run: Run) -> None:
    work = Work()
    first = run("ingest", work, tmp_path / "a")
    run("ingest", work, tmp_path / "b", load_config(CONFIG, {"source.max_users": 5}))
    second = run("ingest", work, tmp_path / "c", load_config(CONFIG, {"seed": 1}))
    run("ingest", work, tmp_path / "d", force=True)
    run("ingest", work, tmp_path / "e", load_config(CONFIG, {"name": "other"}), force=True)
    assert [run.previous for run in work.runs] == [None, None, first, second, None]


def test_progress_is_told_and_never_fatal(tmp_path: Path, run: Run) -> None:
    def work(stage: StageRun) -> StageReport:
        stage.report_progress("reading", rows=5)
        path = Path(stage.run_dir) / "ingest" / "progress.json"
        content = json.loads(path.read_text())
        assert (content["message"], content["metrics"]) == ("reading", {"rows": 5})
        assert abs(content["at"] - time.time()) < 60
        path.unlink()
        path.mkdir()  # nothing can be written there now
        stage.report_progress("reading on", rows=6)
        path.rmdir()
        return StageReport()

    with capture_logs() as logs:
        run("ingest", work, tmp_path / "run")
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["progress cannot be written"]


def test_file_uris_and_relative_paths_are_local(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    monkeypatch.chdir(tmp_path)
    first = run("ingest", work, f"file://{tmp_path}/run")
    assert run("ingest", work, "run") == first
    assert first.outputs["items"].startswith(f"{tmp_path}/run/ingest/")
    colon = run("ingest", Work(), tmp_path / "a:b" / "run", load_config(CONFIG, {"seed": 1}))
    assert Path(colon.outputs["items"]).exists()


@pytest.mark.parametrize("outputs", [{"events": "e"}, {"events": "e", "items": "i", "rejected": "r", "extra": "x"}])
def test_a_report_that_differs_from_the_flow_fails(outputs: dict[str, str], tmp_path: Path, run: Run) -> None:
    spec = replace(STAGES["ingest"], outputs={"events": "", "items": "", "rejected": ""}, optional=())
    with pytest.raises(RuntimeError, match=r"stage ingest: expected the outputs events, items, rejected .* got events"):
        run(spec, lambda stage: StageReport(outputs=outputs), tmp_path)
    assert load_result(str(tmp_path), "ingest") is None


def test_a_disk_that_is_full_where_the_result_is_written_is_one_sentence(small_disk: Path, settings: Settings) -> None:
    config, run_dir = load_config(CONFIG), small_disk / "run"

    def work(stage: StageRun) -> StageReport:
        report = Work()(stage)
        fill(small_disk, left=0)
        return report

    with pytest.raises(UnavailableError, match=rf"^disk of {run_dir}: expected room .*, got a full disk; free it, .*"):
        run_stage("ingest", work, config=config, run_dir=str(run_dir), settings=settings)
    assert not (run_dir / "ingest" / "result.json").exists()
    (small_disk / "filler").unlink()
    assert run_stage("ingest", Work(), config=config, run_dir=str(run_dir), settings=settings).counts
