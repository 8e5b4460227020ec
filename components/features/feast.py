"""Feast's names, imported so that the metrics of this process stay its own; the only place that imports Feast.

`feast.metrics` sets `PROMETHEUS_MULTIPROC_DIR` on import. A process that imports prometheus_client after that, or a
child that inherits the environment, keeps its values in files under that folder instead of in memory: registries then
share them, and the folder goes with the process that made it. So prometheus_client is imported first, and what Feast
set is taken back.

Feast lets typeguard rewrite its classes while they are imported, so that every call checks its arguments: six of ten
CPU seconds of the import, in every worker and most stages. Here they are imported as they are written.
"""

import contextlib
import importlib
import os
import shutil
from typing import Any

import prometheus_client.values  # noqa: F401  # chooses here where values are kept

_NAMES = ("PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR")
_before = {name: os.environ[name] for name in _NAMES if name in os.environ}
_typeguard: Any = importlib.import_module("typeguard")  # of Feast's installation
_typechecked, _typeguard.typechecked = _typeguard.typechecked, lambda checked: checked

import feast.infra.online_stores.sqlite  # noqa: E402, F401  # else at the first read, after the fork
from feast import Entity, FeatureService, FeatureStore, FeatureView  # noqa: E402
from feast.errors import FeastError, FeastModuleImportError  # noqa: E402
from feast.infra.online_stores.helpers import get_online_store_from_config  # noqa: E402
from feast.protos.feast.core.Registry_pb2 import Registry  # noqa: E402
from feast.repo_config import RepoConfig  # noqa: E402

_typeguard.typechecked = _typechecked

__all__ = [
    "Entity",
    "FeastError",
    "FeastModuleImportError",
    "FeatureService",
    "FeatureStore",
    "FeatureView",
    "Registry",
    "RepoConfig",
    "get_online_store_from_config",
    "import_for_reading",
]

for _folder in {os.environ.pop(name) for name in _NAMES if name in os.environ} - set(_before.values()):
    shutil.rmtree(_folder, ignore_errors=True)
os.environ.update(_before)

# What Feast imports when a worker opens the store, and at the first read: other stores too, to see what they can.
_IMPORTED_LATE = (
    "feast.infra.offline_stores.remote",
    "feast.infra.online_stores.dynamodb",
    "feast.infra.online_stores.redis",
    "feast.infra.passthrough_provider",
    "feast.infra.registry.file",
    "feast.repo_operations",
)


def import_for_reading() -> None:
    """Import at once what Feast would import bit by bit, so that processes forked after this share it."""
    for module in _IMPORTED_LATE:
        with contextlib.suppress(ImportError, FeastError):  # of packages that are not installed; Feast goes on, too
            importlib.import_module(module)
