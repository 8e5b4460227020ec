"""For `make test` as a whole: the longest files first, so that none is left to run alone; no garbage among imports."""

import gc
from pathlib import Path

import pytest

# Minutes each; the others take seconds and keep their order.
LONGEST = (
    "e2e/test_chain.py",
    "components/engines/test_spark.py",
    "components/urm/training/test_train.py",
    "components/stages/test_sft.py",
    "test_extras.py",
    "components/recall/process/test_supervisor.py",
    "benchmarks/test_serving.py",
    "benchmarks/test_results.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by LONGEST, every process alike."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_sessionstart(session: pytest.Session) -> None:
    """A file that was renamed would be run last again."""
    gc.disable()  # until all is imported
    missing = [name for name in LONGEST if not (Path(__file__).parent / name).is_file()]
    if missing:
        raise pytest.UsageError(f"LONGEST in tests/conftest.py: expected files, got {missing}; rename them there")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """All is imported."""
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _exempt_from_collections() -> None:
    """No collection looks at what imports and earlier files left: it stays, and each would take a second."""
    gc.collect()
    gc.freeze()
