"""Tests can be found: a module's test has its name, or the list below names the test that covers it."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.worlds import REPOSITORY, imported_names

ROOTS = ("components", "dags", "tests")
DOTTED = re.compile(r"\b[a-z]+(?:\.\w+)+")
# Test → modules of its own room whose test it is besides, or of another room (with its dots).
COVERS = {
    "components/baseline/test_training.py": "batches network",
    "components/cli/test_app.py": "components.__main__ data local options stages studies",
    "components/config/test_load.py": "model sections sources",
    "components/cli/test_releases.py": "components.deploy.releases",
    "components/deploy/test_lease.py": "cluster",
    "components/deploy/test_promotion.py": "target workers components.stages.promote components.release.publication",
    "components/engines/test_duckdb.py": "exhaustion",
    "components/engines/test_spark.py": "engine",
    "components/evaluation/test_policy.py": "power",
    "components/features/test_contexts.py": "expressions sources",
    "components/features/test_targets.py": "window",
    "components/ingestion/test_convert.py": "reading",
    "components/ingestion/test_public.py": "amazon",
    "components/local/test_stack.py": "services",
    "components/recall/api/test_app.py": "problems problem_types responses",
    "components/recall/api/test_events.py": "outcomes",
    "components/recall/operate/test_trace.py": "deadletters",
    "components/cli/test_recall.py": "components.recall.operate.show components.recall.operate.terminal",
    "components/recall/process/test_supervisor.py": "forks health preload signals components.recall.worker.loop",
    "components/recall/serving/test_engine.py": "answers",
    "components/recall/state/test_stream.py": "scripts",
    "components/recall/telemetry/test_otel.py": "setup tracing",
    "components/recall/worker/test_adhoc.py": "components.recall.state.adhoc",
    "components/recall/worker/test_switch.py": "source",
    "components/recall/worker/test_backfill.py": "components.features.users components.recall.state.backfill",
    "components/recall/worker/test_hostile_entries.py": "components.recall.state.events",
    "components/stages/test_baseline.py": "components.baseline.files components.baseline.models",
    "components/stages/test_encode.py": "components.items.content components.items.encoding",
    "components/stages/test_evaluate.py": "gate components.evaluation.examples components.evaluation.predict "
    "components.evaluation.models components.evaluation.report components.evaluation.summary components.schemas.hits",
    "components/stages/test_features.py": "components.features.examples components.schemas.examples",
    "components/stages/test_ingest.py": "components.ingestion.rejects components.ingestion.sources "
    "components.ingestion.write components.ingestion.parts components.schemas.events",
    "components/stages/test_release.py": "components.release.assemble components.release.registered_model "
    "components.release.smoke components.schemas.predictions",
    "components/stages/test_validate.py": "components.validation.frames components.validation.freshness "
    "components.validation.limits components.validation.rules",
    "components/storage/test_runner.py": "contract results workspace",
    "components/studies/ablation/test_summary.py": "figures",
    "components/studies/test_explain.py": "finished",
    "components/urm/data/test_packing.py": "batch batches examples",
    "components/urm/network/test_build.py": "files",
    "components/urm/retrieval/test_index.py": "exact users",
    "components/urm/test_inference.py": "components.urm.data.request",
    "components/urm/training/test_sharded.py": "sharding",
    "components/urm/training/test_train.py": "callbacks trainer validation",
    "dags/test_recall_training.py": "dags.common.params",
    "dags/test_recall_backfill.py": "dags.common.backfill dags.common.backfill_job",
    "dags/trainjob/test_operator.py": "cluster job trigger",
    "e2e/test_chain.py": "components.local.airflow components.local.demo",
}
COVERED_BY = {
    name if "." in name else ".".join((*Path(test).parent.parts, name)): test
    for test, names in COVERS.items()
    for name in names.split()
}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


PATHS = [path for root in ROOTS[:2] for path in (REPOSITORY / root).rglob("*.py")]
MODULES = {_name(path) for path in PATHS if path.name != "__init__.py"}


def own_test(module: str) -> Path:
    """Where the test of a module would be by its name."""
    *room, name = module.split(".")
    return REPOSITORY.joinpath("tests", *room, f"test_{name}.py")


@cache
def named(path: Path) -> frozenset[str]:
    """Modules that a file imports, also inside functions, or names in a string: scripts, targets of monkeypatch."""
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
    texts = [node.value for node in constants if isinstance(node.value, str)]
    found = imported_names(path).union(*(DOTTED.findall(text) for text in texts))
    found |= {"components.__main__"} if "components" in texts else set()
    return frozenset(name for name in found if name.split(".")[0] in ROOTS)


def reached(test: Path) -> set[str]:
    """All modules that a test names, directly or by what it names; the fixtures of its folders among them."""
    folders = [folder for folder in test.parents if folder.is_relative_to(REPOSITORY / "tests")]
    waiting = [test, *(path for folder in folders if (path := folder / "conftest.py").exists())]
    found: set[str] = set()
    while waiting:
        for name in named(waiting.pop()) - found:
            found.add(name)
            place = REPOSITORY.joinpath(*name.split("."))
            waiting += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return found


def test_every_module_has_a_test_of_its_name_or_stands_in_the_list() -> None:
    without = {module for module in MODULES if not own_test(module).exists()}
    assert (without - set(COVERED_BY), set(COVERED_BY) - without) == (set(), set())  # uncovered, stale


@pytest.mark.parametrize("test", COVERS)
def test_a_test_reaches_the_modules_that_it_covers(test: str) -> None:
    names = {module for module, by in COVERED_BY.items() if by == test}
    assert names <= reached(REPOSITORY / "tests" / test)


def test_a_test_reaches_the_module_of_its_name() -> None:
    assert [module for module in MODULES if own_test(module).exists() and module not in reached(own_test(module))] == []


def test_no_module_is_covered_twice() -> None:
    assert len(COVERED_BY) == sum(len(names.split()) for names in COVERS.values())
