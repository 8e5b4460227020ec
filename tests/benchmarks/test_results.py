import os
import re
import sys
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from benchmarks.results import CONFIGS, SEEDS, SERVING, STAGES, URM, Step, plan, run_step
from components.config import load_named_config
from components.flow import STAGES as ALL_STAGES
from components.studies.ablation.grid import load_grid
from tests.worlds import CONFIGS as CONFIG_FILES
from tests.worlds import REPOSITORY, run_python


@pytest.fixture(scope="module")
def steps():
    return list(plan(["urm.max_steps=5"], Path("data"), Path("results")))


def test_names_are_unique_and_every_data_set_has_all_stages_with_every_seed(steps):
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for config in CONFIGS:
        for seed in SEEDS:
            places = [names.index(f"{config}-seed{seed}-{stage}") for stage in STAGES]
            assert places == sorted(places)
        assert f"{config}-compare" in names
    assert list(STAGES) == list(ALL_STAGES)[: len(STAGES)]


def test_every_command_is_one_that_urm_knows(steps):
    from components.cli.app import app

    try:
        commands = {step.command[len(URM) :][:2] if "ablation" in step.name else step.command[len(URM) :][:1]: step
                    for step in steps if step.command[: len(URM)] == URM}  # fmt: skip
        for step in commands.values():
            answer = CliRunner().invoke(app, [*step.command[len(URM) :], "--help"])
            assert answer.exit_code == 0, answer.output
    finally:
        structlog.reset_defaults()  # the command line logs to the stream of its own call, now closed


def read_configs(steps):
    """The configuration of every step that has one."""
    for step in steps:
        if "--config" in step.command:
            options = list(zip(step.command, step.command[1:], strict=False))
            settings = [value for option, value in options if option == "--set"]
            yield load_named_config(dict(options)["--config"], CONFIG_FILES, settings)


def test_every_setting_fits_its_configuration(steps):
    for config in read_configs(steps):
        assert config.urm.max_steps == 5
        if config.name.startswith("amazon_"):
            assert config.source.data_dir == f"data/{config.name}"


def test_the_readme_counts_the_variants():
    text = (REPOSITORY / "benchmarks" / "README.md").read_text()
    count = int(re.search(r"(\d+) variants and the reference", text).group(1))
    assert count == len(load_grid("urm", CONFIG_FILES).variants) - 1


def test_a_step_keeps_its_output_and_tells_of_failure(tmp_path):
    good = Step("good", "part", (sys.executable, "-c", "print('a table')"), 1)
    bad = Step("bad", "part", (sys.executable, "-c", "import sys; sys.exit('no data')"), 1)
    assert run_step(good, tmp_path)
    assert not run_step(bad, tmp_path)
    assert (tmp_path / "good.log").read_text().endswith("a table\n")
    assert "no data" in (tmp_path / "bad.log").read_text()


def test_a_failed_step_lets_the_others_go_on_and_ends_as_a_failure(tmp_path):
    """The real command line; the data of this set are not there."""
    options = ("--only", "amazon_toys-seed0-ingest", "--data", "/no/such/folder")
    process = run_python("-m", "benchmarks.results", *options, env={**os.environ, "URM_HOME": str(tmp_path)})
    assert process.returncode == 1, process.stderr
    assert "[1/1] amazon_toys-seed0-ingest (up to 1 min) … FAILED" in process.stdout
    assert "/no/such/folder/amazon_toys" in (tmp_path / "results" / "amazon_toys-seed0-ingest.log").read_text()


@pytest.mark.parametrize("module", ["throughput", *SERVING, "one_redis"])
def test_a_benchmark_knows_the_options_of_its_step(module, steps, unknown_options):
    step = next(step for step in steps if f"benchmarks.{module}" in step.command)
    assert unknown_options(f"benchmarks.{module}", step.command[3:]) == []


def test_a_benchmark_is_a_command():
    assert "--help" in run_python("-m", "benchmarks.one_redis", "--help", check=True).stdout
