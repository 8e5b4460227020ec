"""DAG files and their helpers use Airflow's public interface only.

Airflow's page *Public Interface* names `airflow.sdk` (its `__all__`), the exceptions, which Airflow 3.3 has moved to
`airflow.sdk.exceptions`, operators and hooks of providers, and triggers; `airflow.sdk.types` exports types for
annotations.
"""

import ast
import importlib
import re

import pytest

from tests.worlds import REPOSITORY

FILES = sorted((REPOSITORY / "dags").rglob("*.py"))
LISTED = ("airflow.sdk", "airflow.sdk.types")
OPEN = re.compile(
    r"airflow\.sdk\.exceptions|airflow\.triggers\.base|airflow\.providers(\.\w+)+\.(operators|hooks)\.\w+"
)


def private_imports(source: str) -> list[str]:
    """Imports of Airflow that are not public."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "airflow"]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "airflow":
            listed = importlib.import_module(node.module).__all__ if node.module in LISTED else None
            for alias in node.names:
                public = alias.name in listed if listed is not None else bool(OPEN.fullmatch(node.module))
                if not public or alias.name.startswith("_"):
                    found.append(f"{node.module}.{alias.name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_public_modules_of_airflow_are_imported(path):
    assert private_imports(path.read_text()) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from airflow.sdk.bases.skipmixin import SkipMixin", ["airflow.sdk.bases.skipmixin.SkipMixin"]),
        ("from airflow.sdk.definitions.context import Context", ["airflow.sdk.definitions.context.Context"]),
        ("from airflow.models import DagRun", ["airflow.models.DagRun"]),
        ("from airflow.sdk import definitions", ["airflow.sdk.definitions"]),
        ("import airflow.utils.state", ["airflow.utils.state"]),
        ("from airflow.sdk import SkipMixin, dag", []),
    ],
)
def test_what_counts_as_private(line, found):
    assert private_imports(line) == found
