"""What `mlflow.pyfunc.load_model("models:/urm@champion")` gives: the release's bundle, verified, as a predictor.

One row is one request: `history_item_ids`, newest first, and `task`; the parameter `k` says how many items. For
predictions with counts, ages and queries, use the recall API or `components.urm.inference`.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from components.addresses import fetch
from components.device import choose_device
from components.exceptions import MissingInputError
from components.release.bundle import read_tasks, verify
from components.release.registry import POINTER, find_version
from components.settings import Settings, get_settings
from components.urm.data.request import RecallRequest, UserContext
from components.urm.inference import UrmRecaller


class BundlePredictor:
    """MLflow's generic interface over a bundle."""

    def __init__(self, bundle: Path, device: str, digest: str, release: str) -> None:
        verify(bundle, digest).require(release, str(bundle))
        self._tasks = {task.name: task for task in read_tasks(bundle)}
        self._recaller = UrmRecaller.load(bundle / "model", bundle / "item_table", bundle / "index.faiss", device)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Items and scores of each row, best first."""
        k = int((params or {}).get("k", 20))
        rows = zip(model_input["history_item_ids"], model_input["task"], strict=True)
        requests = [RecallRequest(_context(item_ids), self._tasks[task]) for item_ids, task in rows]
        items, scores = self._recaller.recall(requests, k)
        return pd.DataFrame({"item_ids": [row.tolist() for row in items], "scores": [row.tolist() for row in scores]})


def _load_pyfunc(data_path: str) -> BundlePredictor:
    """Entry point that MLflow calls by this name."""
    settings = get_settings()
    pointer = json.loads((Path(data_path) / POINTER).read_text())
    release, digest = pointer["release"], pointer.get("manifest", "")  # none in versions from before it was noted
    try:
        bundle = _fetch(settings, pointer["bundle"], digest)
    except MissingInputError:  # the registry knows better where equal content was registered again
        tags = _read_tags(release)
        if "urm.bundle" not in tags:
            raise
        digest = tags.get("urm.manifest", "")
        bundle = _fetch(settings, tags["urm.bundle"], digest)
    return BundlePredictor(bundle, choose_device(settings), digest, release)


def _fetch(settings: Settings, uri: str, digest: str) -> Path:
    settings.require_allowed(uri)
    return fetch(uri, settings.cache_path / "bundles" / digest[:16])


def _read_tags(release: str) -> dict[str, str]:
    """Tags of the version that holds a release; none where the registry does not know it or does not answer."""
    client, model_name = mlflow.MlflowClient(), release.rpartition("-")[0]
    try:
        version = find_version(client, model_name, release)
        return {} if version is None else dict(client.get_model_version(model_name, version).tags)
    except MlflowException:
        return {}


def _context(item_ids: Any) -> UserContext:
    """A context of items alone: one event each, a day ago."""
    ids = np.asarray(item_ids, dtype=np.int64)
    return UserContext(
        item_ids=ids,
        counts=np.ones(len(ids), dtype=np.int32),
        days_since=np.ones(len(ids), dtype=np.float32),
        behaviors=["purchase"] * len(ids),
        num_events=len(ids),
        num_items=len(ids),
        num_active_days=1,
        days_since_last=1.0,
    )
