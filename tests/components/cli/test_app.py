import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import typer
from typer.testing import CliRunner

from components import __version__
from components.cli.app import app
from components.cli.stages import fingerprint_models
from components.config import load_config
from components.flow import STAGES
from components.settings import get_settings
from tests.worlds import CONFIGS, run_python


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configs: Path) -> Path:
    for name in [name for name in os.environ if name.startswith("URM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("URM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("URM_CONFIGS_DIR", str(configs))
    get_settings.cache_clear()
    return tmp_path / "home"


def urm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "components", *arguments, timeout=60)


def assert_one_sentence(process: subprocess.CompletedProcess[str], exit_code: int, *parts: str) -> None:
    assert process.returncode == exit_code, process.stderr
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith("error ")
    assert process.stderr.endswith(".\n")
    for part in parts:
        assert part in process.stderr


WITH_THE_CORE_ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {"redis", "fastapi", "starlette", "mlflow", "torch", "pandas", "numpy", "pyarrow", "duckdb", "ibis"}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
import components.client
from components.cli.app import run_app
run_app()
"""


@pytest.mark.parametrize("arguments", ["--version", "--help", "ingest --help", "recall --help", "up --help"])
def test_help_and_client_need_the_core_alone(home: Path, arguments: str) -> None:
    process = run_python("-c", WITH_THE_CORE_ALONE, *arguments.split())
    assert process.returncode == 0, process.stderr


def test_a_command_without_its_extra(home: Path) -> None:
    process = run_python("-c", WITH_THE_CORE_ALONE, "up")
    assert_one_sentence(process, 2, "expected the Python module redis", "pip install 'urm-recall[all]'")


def test_a_stage_before_its_input(home: Path) -> None:
    process = urm("validate", "--run-dir", "first")
    assert_one_sentence(process, 2, "expected the result of stage 'ingest'", f"{home}/runs/first", "run `urm ingest`")


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("validate --set urm.max_stepz=5", ["'urm.max_stepz'", "did you mean 'max_steps'"]),
        ("show --config /no/such.yaml", ["configuration /no/such.yaml", "check the path"]),
        ("show --config nope", ["nope.yaml: expected a readable YAML file"]),
        ("validate --set name='[/x][bold]'", ["got '[/x][bold]'"]),  # printed as it is
        ("show --config [/x].yaml", ["configuration [/x].yaml:"]),
    ],
)
def test_a_mistake_is_one_sentence(home: Path, command: str, parts: list[str]) -> None:
    assert_one_sentence(urm(*command.split()), 2, *parts)


def test_the_demo_takes_no_path_since_airflow_starts_runs_by_name(home: Path, configs: Path) -> None:
    process = urm("demo", "--config", f"{configs}/complete_journey.yaml")
    assert_one_sentence(process, 2, "--config: expected the name of a file in configs/", "/complete_journey.yaml'")
    assert not (home / "services.json").exists()


def test_features_of_another_environment_or_by_other_definitions_are_other_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("components.cli.stages.run_spec", lambda *_, options: asked.append(options))
    monkeypatch.setenv("URM_FEATURE_REPO_DIR", str(tmp_path))  # not the folder beside this package
    for environment, definitions in (("embedded", "a"), ("production", "a"), ("production", "b"), ("production", "b")):
        (tmp_path / "definitions.py").write_text(definitions)
        monkeypatch.setenv("URM_FEATURE_ENVIRONMENT", environment)
        get_settings.cache_clear()
        assert CliRunner().invoke(app, ["features"]).exit_code == 0
    get_settings.cache_clear()
    assert [options["feature_environment"] for options in asked] == ["embedded", *["production"] * 3]
    first, again, other, same = (options["feature_definitions"] for options in asked)
    assert (first, other) == (again, same)
    assert first != other


def test_what_lies_in_a_model_folder_decides_the_results_of_the_stages_that_read_it(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "weights.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"first")
    folder = {"items.text_encoder": str(weights.parent), "urm.backbone": str(weights.parent)}
    config = load_config(CONFIGS / "complete_journey.yaml", folder)
    first = {stage: fingerprint_models(STAGES[stage], config) for stage in STAGES}
    assert {stage: [*found] for stage, found in first.items() if found} == {
        "encode": ["items.text_encoder"],
        "baseline": ["items.text_encoder"],
        "sft": ["items.text_encoder", "urm.backbone"],
    }
    weights.write_bytes(b"tuned")
    second = fingerprint_models(STAGES["sft"], config)
    assert all(second[name] != digest for name, digest in first["sft"].items())
    packaged = load_config(CONFIGS / "complete_journey.yaml")
    assert not any(fingerprint_models(spec, packaged) for spec in STAGES.values())


def test_a_run_directory_that_cannot_be_made(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    process = urm("ingest", "--run-dir", f"{tmp_path}/file/run", "--set", "source.max_users=1")
    assert_one_sentence(process, 2, "expected a folder that can be written, got Not a directory")


def test_a_setting_that_does_not_fit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URM_DEVICE", "gpu")
    assert_one_sentence(urm("show"), 2, "setting URM_DEVICE: expected 'auto', 'cpu' or 'cuda', got 'gpu'")


def test_a_traceback_only_with_debug(home: Path) -> None:
    process = urm("--debug", "validate", "--run-dir", "first")
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "MissingInputError" in process.stderr


def test_an_option_that_does_not_exist(home: Path) -> None:
    process = urm("encode", "--nope")
    assert process.returncode == 2
    assert "No such option" in process.stderr
    assert "Traceback" not in process.stderr


def test_show_prints_the_resolved_configuration(home: Path) -> None:
    process = urm("show", "--set", "urm.max_steps=7")
    assert process.returncode == 0
    assert "  max_steps: 7\n" in process.stdout
    assert "  text_hidden: 0\n" in process.stdout  # a default


def test_the_environment_names_the_configuration_where_no_option_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("URM_CONFIG", "amazon_beauty")
    assert urm("show").stdout.startswith("name: amazon_beauty\n")
    assert urm("show", "--config", "complete_journey").stdout.startswith("name: complete_journey\n")


def test_version(home: Path) -> None:
    assert urm("--version").stdout == f"{__version__}\n"


def commands(group: typer.core.TyperGroup, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        found.append((*path, name))
        if isinstance(command, typer.core.TyperGroup):
            found += commands(command, (*path, name))
    return found


COMMANDS = commands(typer.main.get_command(app))  # type: ignore[arg-type]


def test_every_stage_is_a_command_in_the_order_of_the_flow() -> None:
    names = [path[0] for path in COMMANDS if path[0] in STAGES]
    assert names == list(STAGES)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    first = result.output.split("Usage:")[1].split("\n\n")[0] if "\n\n" in result.output else result.output
    assert " ".join(path) in first or path[-1] in result.output


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_of_every_command_has_a_help(path: tuple[str, ...]) -> None:
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", "x")] == []


def test_help_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'mlflow', 'transformers', 'pandas', 'feast', 'great_expectations'}"
    check = f"import sys, components.cli.app; print(sorted({heavy} & set(sys.modules)))"
    assert run_python("-c", check, check=True).stdout == "[]\n"


def test_sigterm_closes_the_mlflow_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    program = (
        "import mlflow, time\n"
        "from components.cli.app import end_on_sigterm\n"
        f"end_on_sigterm(); mlflow.set_tracking_uri({uri!r})\n"
        "with mlflow.start_run():\n"
        "    print('open', flush=True)\n"
        "    time.sleep(60)\n"
    )
    # MLflow leaves the experiment that another test opened in the environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    runs = mlflow.MlflowClient(uri).search_runs(["0"])
    assert [run.info.status for run in runs] == ["FAILED"]
