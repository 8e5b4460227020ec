from datetime import timedelta
from pathlib import Path

import pytest

from components.config import RunConfig, load_config
from components.flow import STAGES, STUDIES
from components.storage import StageResult, code, fingerprint
from components.storage.code import source_files
from tests.worlds import REPOSITORY
from tests.worlds.stages import CONFIG
from tests.worlds.tables import put


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package with an entry, what it imports, what only carries it, and what it does not import."""
    files = {
        "stages/encode": "from components.items import table\nfrom components.storage import StageRun\n",
        "storage/__init__": "from components.storage.contract import StageRun\n",
        "storage/contract": "class StageRun: ...\n",
        "items/table": "def read():\n    import components.schemas.events\n",
        "schemas/events": "EVENTS = 1\n",
        "urm/model": "y = 1\n",
        "config/split": "WEEKS = 1\n",
        "config/run": "x = 1\n",
    } | {f"{package}__init__": "" for package in ("", "stages/", "items/", "schemas/", "urm/", "config/")}
    for name, text in files.items():
        path = tmp_path / "components" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_code_of_a_stage_is_all_that_it_imports(tree: Path) -> None:
    found = {str(path.relative_to(tree / "components")) for path in source_files("components.stages.encode", tree)}
    packages = {"stages/__init__.py", "items/__init__.py", "schemas/__init__.py"}
    assert found - packages == {"stages/encode.py", "items/table.py", "schemas/events.py", "config/split.py"}


def test_a_module_that_is_not_there(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no module components\.stages\.absent"):
        source_files("components.stages.absent", tree)


@pytest.mark.parametrize("spec", [*STAGES.values(), *STUDIES.values()], ids=lambda spec: spec.name)
def test_no_stage_depends_on_what_stands_above_it(spec: object) -> None:
    parts = {path.relative_to(REPOSITORY).parts[1] for path in source_files(spec.entry, REPOSITORY)}  # type: ignore[attr-defined]
    assert not parts & {"cli", "local"}


def test_a_fingerprint_sees_code_configuration_inputs_and_options(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "ROOT", tree)
    result = put(tree, "validate", fingerprint="1")

    def of(config: RunConfig, done: StageResult = result, **options: bool) -> str:
        source_files.cache_clear()
        return fingerprint(STAGES["encode"], config, {"validate": done}, options)

    config = load_config(CONFIG)
    base = of(config)
    assert of(config) == base
    assert of(load_config(CONFIG, {"urm.max_steps": 9})) == base
    assert of(load_config(CONFIG, {"items.batch_size": 9})) != base
    assert of(load_config(CONFIG, {"seed": 9})) != base
    assert of(load_config(CONFIG, {"features.max_test_examples": 9})) == base
    assert of(load_config(CONFIG, {"features.min_item_events": 9})) != base
    assert of(config, result.model_copy(update={"fingerprint": "0"})) != base
    assert of(config, result.model_copy(update={"finished_at": result.finished_at + timedelta(seconds=1)})) != base
    assert of(config, result.model_copy(update={"reused_from": "elsewhere"})) == base
    assert of(config, flag=True) != base
    for unrelated in ("urm/model", "storage/contract", "config/run"):
        (tree / "components" / f"{unrelated}.py").write_text("z = 2\n")
        assert of(config) == base
    for deciding in ("schemas/events", "config/split"):
        before = of(config)
        (tree / "components" / f"{deciding}.py").write_text("EVENTS = 2\n")
        assert of(config) != before
