import json
import os
from pathlib import Path

import pytest

from tests.worlds import REPOSITORY, run_python

PROBE = """
import json, os, components.recall.worker.stream
from prometheus_client import CollectorRegistry, Counter
first, second = (Counter("a", "b", registry=CollectorRegistry()) for _ in range(2))
first.inc()
names = ("PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR")
print(json.dumps([second._value.get(), [os.environ.get(name) for name in names]]))
"""


def probe(tmp_path: Path, **environment: str) -> list[object]:
    env = {**os.environ, "TMPDIR": str(tmp_path), **environment}
    return json.loads(run_python("-c", PROBE, check=True, env=env).stdout)


def test_metrics_of_a_process_that_imports_feast_stay_in_its_memory(tmp_path: Path) -> None:
    """Feast would have every registry of the process, and of its children, share the values of one folder."""
    assert probe(tmp_path) == [0, [None, None]]
    assert not list(tmp_path.glob("feast_metrics_*"))


@pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR"])
def test_a_folder_for_metrics_that_the_user_names_stays(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    _, names = probe(tmp_path, **{name: str(folder)})
    assert sorted(names, key=str) == sorted([None, str(folder)], key=str)
    assert folder.is_dir()


UNCHECKED = """
import components.features.feast, typeguard
from feast import FeatureView
assert "typeguard" not in FeatureView.__init__.__code__.co_names, "typeguard has rewritten Feast's classes"
def check(number: int) -> None: ...
assert "typeguard" in typeguard.typechecked(check).__code__.co_names
"""


def test_feast_is_imported_without_the_checks_of_every_call_and_others_keep_theirs(tmp_path: Path) -> None:
    """They are more than half of the CPU time that importing it takes."""
    script = tmp_path / "unchecked.py"  # typeguard reads the source of what it rewrites
    script.write_text(UNCHECKED)
    run_python(str(script), check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
