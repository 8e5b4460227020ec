"""The fingerprint of a stage's work: equal fingerprints mean equal results."""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from components import __file__ as package_file
from components import __version__
from components.config import RunConfig
from components.flow import StageSpec
from components.storage.contract import StageResult

ROOT = Path(package_file).parent.parent
# Packages that carry a stage's work and do not decide its result.
CARRIERS = (
    *("storage", "tracking", "config", "flow", "addresses", "caches", "settings", "exceptions", "memory", "progress"),
    "redis_client",
)
# But what these make of a configuration (the cuts of a split, whom a task trains) stands in no section of it.
DECIDING = ("components.config.split", "components.config.tasks")


def fingerprint(spec: StageSpec, config: RunConfig, inputs: dict[str, StageResult], options: dict[str, Any]) -> str:
    """SHA-256 over everything that decides a stage's result: code, configuration, inputs, options.

    An input is a result, not the work that made it: trainings end by the clock, so that equal work may leave another
    model. Its instant tells them apart; a reused result keeps the one that it had.
    """
    digest = hashlib.sha256(f"{spec.name} {__version__} {config.fingerprint(spec.sections)}".encode())
    for source in source_files(spec.entry, ROOT):
        digest.update(str(source.relative_to(ROOT)).encode() + source.read_bytes())
    for name in sorted(inputs):
        digest.update(f"{name}={inputs[name].fingerprint} {inputs[name].finished_at.isoformat()}".encode())
    digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()


@lru_cache(maxsize=16)
def source_files(module: str, root: Path) -> tuple[Path, ...]:
    """Source of a module and of all that it imports from `components`, inside functions too, but for the carriers.

    What decides in the carriers is there whether or not it is imported.

    `root` is the folder that holds `components`.

    Raises:
        FileNotFoundError: There is no such module.
    """
    if not _is_module(root, module):
        raise FileNotFoundError(f"no module {module} under {root}")
    found: dict[str, Path] = {}
    waiting = [module, *(name for name in DECIDING if _is_module(root, name))]
    while waiting:
        name = waiting.pop()
        if name in found or (name.split(".")[1] in CARRIERS and name not in DECIDING):
            continue
        found[name] = _path(root, name)
        waiting += (other for other in _imported(found[name], root) if other not in found)
    return tuple(sorted(found.values()))


def _imported(path: Path, root: Path) -> Iterator[str]:
    """Modules of `components` that a file imports, with the packages that they lie in."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "components":
                packages = (".".join(parts[:depth]) for depth in range(2, len(parts) + 1))
                yield from (package for package in packages if _is_module(root, package))


def _is_module(root: Path, name: str) -> bool:
    return _path(root, name).is_file()


def _path(root: Path, name: str) -> Path:
    place = root / name.replace(".", "/")
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
