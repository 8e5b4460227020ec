"""Who promoted which release, when, why and with which figures: the registry's versions beside what serves."""

import json
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components.config import ReleaseConfig
from components.exceptions import UrmError
from components.mlflow_server import mlflow_errors
from components.redis_client import connect
from components.release.publication import SERVING, Publication, read_publication
from components.release.registry import PROMOTION_TAG, open_registry
from components.settings import Settings


@dataclass(frozen=True)
class Promotion:
    """One promotion of a release, or a release that was never promoted.

    Attributes:
        release: Its name.
        version: Its version of the registered model.
        order: Number of the publication; 0 if it was never promoted.
        note: by, why, at, seconds and what was measured; empty if it was never promoted.
        gate: What the gate said: passed or not, and the verdict.
        now: serving and the aliases, on the newest row of a release.
    """

    release: str
    version: str
    order: int
    note: dict[str, Any]
    gate: tuple[str, str]
    now: tuple[str, ...] = ()


def list_promotions(settings: Settings, config: ReleaseConfig) -> tuple[list[Promotion], str]:
    """Promotions, newest first, before them releases that were never promoted; and why it is unknown what serves.

    Raises:
        ConfigError: MLflow lets this user not read them.
        UnavailableError: MLflow is away.
    """
    with mlflow_errors(settings.tracking_uri):
        return _list_promotions(settings, config)


def _list_promotions(settings: Settings, config: ReleaseConfig) -> tuple[list[Promotion], str]:
    registry = open_registry(settings)
    serving, unknown = _read_serving(settings)
    try:
        aliases = registry.get_registered_model(config.model_name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return [], unknown
    rows: list[Promotion] = []
    for version in _all_versions(registry, config.model_name):
        tags, number = version.tags, str(version.version)
        release, gate = tags.get("urm.release", ""), (tags.get("urm.gate", ""), tags.get("urm.gate_verdict", ""))
        state = ["serving"] if serving is not None and serving.release == release else []
        state += [alias for alias in ("champion", "previous", "candidate") if str(aliases.get(alias)) == number]
        notes = {
            int(key.removeprefix(PROMOTION_TAG)): json.loads(text)
            for key, text in tags.items()
            if key.startswith(PROMOTION_TAG)
        }
        newest = max(notes, default=0)
        for order, note in notes.items() or [(0, {})]:
            now = tuple(state) if order == newest else ()
            rows.append(Promotion(release, number, order, note, gate, now))
    return sorted(rows, key=lambda row: (row.order == 0, row.order, int(row.version)), reverse=True), unknown


def _all_versions(registry: MlflowClient, model_name: str) -> list[Any]:
    versions: list[Any] = []
    token = None
    while True:
        page = registry.search_model_versions(f"name = '{model_name}'", page_token=token)
        versions += page
        token = page.token
        if not token:
            return versions


def _read_serving(settings: Settings) -> tuple[Publication | None, str]:
    """What serves by the target's own truth, or why that is unknown."""
    try:
        if settings.deploy_to == "kubernetes":
            from components.deploy.cluster import Cluster
            from components.deploy.kubernetes import WORKER, read_template

            return read_template(Cluster.open(settings.namespace).read_deployment(WORKER)), ""
        with connect(settings.redis_url) as client:
            return read_publication(client, SERVING), ""
    except UrmError as error:
        return None, str(error)
