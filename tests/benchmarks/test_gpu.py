"""The plan for a GPU is valid, fits its time, goes on where it stopped, and its report renders what is there."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import pytest

from benchmarks import gpu
from benchmarks.gpu import MPS, Plan, main, render
from benchmarks.records import find_tuned_seeds, read_result
from benchmarks.results import Step
from components.schemas.hits import HITS
from components.settings import get_settings
from tests.benchmarks.test_results import read_configs
from tests.worlds import REPOSITORY, make_settings
from tests.worlds.tables import put, write


@pytest.fixture
def with_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == MPS else None)


@pytest.mark.parametrize("tiny", [False, True])
def test_the_plan_fits_its_time_and_its_settings_their_configurations(with_mps: None, tiny: bool) -> None:
    plan = Plan(Path("gpu"), "cuda", ["urm.learning_rate=0.5"], Path("data"), tiny)
    steps = list(plan.steps())
    assert len({step.name for step in steps}) == len(steps)
    assert sum(step.minutes for step in steps if step.part == "gpu") <= 40
    configs = list(read_configs(steps))
    assert {(config.name, config.urm.pretrained) for config in configs} == {
        (name, pretrained) for name in ("complete_journey", "amazon_beauty") for pretrained in (True, False)
    }
    assert {(config.urm.num_layers, config.urm.learning_rate) for config in configs} == {(1 if tiny else 30, 0.5)}
    tests = next(step.command for step in steps if step.name == "tests")
    assert [word for word in tests if word.startswith("tests/") and not (REPOSITORY / word).exists()] == []


def test_every_option_of_a_measurement_exists(
    with_mps: None, unknown_options: Callable[[str, Sequence[str]], list[str]]
) -> None:
    for step in Plan(Path("gpu"), "cuda").steps():
        if step.name in ("throughput", "inference", "instances-mps"):
            module, *options = step.command[step.command.index("-m") + 1 :]
            assert unknown_options(module, options) == []


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step succeeds, one fails and one is over its time; the next run repeats these two."""
    python, counted = (sys.executable, "-c"), tmp_path / "counted"
    count = f"open({str(counted)!r}, 'a').write('x'); "
    steps = [
        Step("good", "preparation", (*python, count), 1),
        Step("bad", "preparation", (*python, f"{count} import sys; sys.exit('no data')"), 1),
        gpu._limit("long", (*python, f"{count} import time; time.sleep(100)"), 0.05),
    ]
    monkeypatch.setattr(Plan, "steps", lambda self: iter(steps))
    monkeypatch.setenv("URM_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny"])
    for runs, letters in ((1, 3), (2, 5)):
        get_settings.cache_clear()
        assert main() == 1
        assert counted.read_text() == "x" * letters, runs
    get_settings.cache_clear()
    report = (tmp_path / "gpu-tiny" / "report.md").read_text()
    assert "**Failed: bad**" in report and "**Failed: long**" in report and "Failed: good" not in report
    assert "no data" in (tmp_path / "gpu-tiny" / "bad.log").read_text()


def test_the_report_has_what_is_there(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    plan = Plan(tmp_path / "gpu", "cuda")
    rows = [
        {"example_id": number, "user_id": f"u{number % 9}", "task": "repurchase", "model": "urm", "k": 100,
         "hits": number % 2, "targets": 1} for number in range(40)
    ]  # fmt: skip
    for weights, recall in {"pretrained": 0.5, "random": 0.0}.items():
        run_dir = Path(settings.find_run_dir(plan.run_name("complete_journey", weights)))
        hits = [row | {"hits": row["hits"] * (weights == "pretrained")} for row in rows]
        tasks = {"repurchase": {"recall": {"urm": recall, "target_attention": 0.4}}}
        outputs = {"hits": write(run_dir / "hits.parquet", HITS, hits)}
        put(run_dir, "evaluate", outputs, metrics={"k": 100, "tasks": tasks})
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>'
        "</testcase></testsuite></testsuites>"
    )
    (tmp_path / "gpu" / "throughput.json").write_text(json.dumps({"share_of_peak": 0.41, "peak_gflops": {"bf16": 7e5}}))
    (tmp_path / "gpu" / "instances.json").write_text(json.dumps([{"instances": 1}, {"instances": 2, "added": 0.091}]))
    done = {"tests": {"succeeded": False, "seconds": 61.0, "commit": "abc", "date": "2026-11-28"}}
    report = render(plan, settings, done)
    for line in (
        "**Failed: tests**", "| commit | abc |", "1 passed, 1 failure, 0 error", "- a::bad", "| share of peak | 0.41 |",
        "| peak gflops | bf16 700,000 |", "| 1 | – |", "| 2 | 0.091 |", "Pretrained minus random: +0.5000 (95 %",
        "Amazon Beauty is left out",
    ):  # fmt: skip
        assert line in report, report
    headline, *runs = next(line for line in report.splitlines() if line.startswith("| mean |")).split(" | ")[2:]
    records = [f"complete_journey-tuned-seed{seed}" for seed in find_tuned_seeds("complete_journey")]
    kept = [task["recall"]["urm"] for of in records for task in read_result(of, "evaluate").metrics["tasks"].values()]
    assert float(headline) == pytest.approx(mean(kept), abs=1e-3)
    assert runs == ["0.5", "0 |"]
    assert (
        "This section failed" not in report
        and "| complete_journey-pretrained-ingest | preparation | not run yet | – |" in report
    )
