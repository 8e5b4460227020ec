"""The MLflow model registry: a version for each release, and the aliases candidate → champion → previous.

A version is a real MLflow model whose data is the manifest and the bundle's address: the bundle itself stays where
the release stage put it, so that nothing is stored twice. `mlflow.pyfunc.load_model("models:/urm@champion")` fetches
the bundle, verifies it and predicts (components/release/registered_model.py).
"""

import json
import tempfile
import warnings
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

import components
from components.exceptions import ReleaseError
from components.mlflow_server import mlflow_errors, open_server
from components.release.bundle import MANIFEST, Manifest, hash_manifest
from components.settings import Settings

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
POINTER = "bundle.json"
PROMOTION_TAG = "urm.promotion."  # and the order: JSON of who promoted the version, when and why, and what was measured
_ORDER_TAG = "urm.order"

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(Array(DataType.long), "history_item_ids"), ColSpec(DataType.string, "task")]),
    outputs=Schema([ColSpec(Array(DataType.long), "item_ids"), ColSpec(Array(DataType.double), "scores")]),
    params=ParamSchema([ParamSpec("k", DataType.long, 20)]),
)


def register(bundle: Path, uri: str, manifest: Manifest, model_name: str, tags: dict[str, str]) -> str:
    """Register a release as the candidate, inside an active MLflow run; a release known already is not made twice.

    Args:
        bundle: A local folder with its manifest.
        uri: Where the bundle lies: what is registered may be served at once.
        manifest: Its manifest.
        model_name: Name of the registered model.
        tags: Tags of the version.

    Returns:
        The version.
    """
    client = mlflow.MlflowClient()
    version = find_version(client, model_name, manifest.release)
    if version is None:
        own = _log_version(bundle, uri, manifest, model_name, tags)
        version = find_version(client, model_name, manifest.release) or own
        if version != own:  # another process has registered equal content meanwhile
            client.delete_model_version(model_name, own)
    for key, value in tags.items():
        client.set_model_version_tag(model_name, version, key, value)
    try:
        client.set_registered_model_alias(model_name, CANDIDATE, version)
    except MlflowException as error:
        if "unique constraint" not in str(error).lower():
            raise
        client.set_registered_model_alias(model_name, CANDIDATE, version)  # another process has made it meanwhile
    return version


def find_version(client: mlflow.MlflowClient, model_name: str, release: str) -> str | None:
    """The first version that holds a release, or None."""
    if "'" in release:  # no release has one, and it would end the text in the filter
        return None
    found = client.search_model_versions(f"name = '{model_name}' and tag.`urm.release` = '{release}'")
    return str(min(int(version.version) for version in found)) if found else None


def release_of(version: Any | None) -> str:
    """The release that a model version holds; empty for none."""
    return "" if version is None else str(version.tags.get("urm.release", ""))


def version_of_alias(client: mlflow.MlflowClient, model_name: str, alias: str) -> Any | None:
    """The model version under an alias, or None."""
    try:
        return client.get_model_version_by_alias(model_name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def crown(client: mlflow.MlflowClient, model_name: str, version: str, order: int) -> str | None:
    """Make a version the champion and the champion before it the previous one.

    Args:
        client: Of the registry.
        model_name: Name of the registered model.
        version: The version.
        order: Number of the publication that made it serve; a later one is not undone.

    Returns:
        The version that is now `previous`; None if there was no champion before. Crowning the champion's release again
        changes nothing about that.

    Raises:
        ReleaseError: A later promotion has set the aliases already.
    """
    if last_order(client, model_name) > order:
        raise ReleaseError(
            f"version {version} of {model_name!r}",
            expected="the latest promotion",
            got="a later one that has set the aliases already",
            remedy="see what serves, and promote again if that is not what you want",
        )
    client.set_registered_model_tag(model_name, _ORDER_TAG, str(order))
    # Compared by release: older registries may hold one twice.
    release = release_of(client.get_model_version(model_name, version))
    champion = version_of_alias(client, model_name, CHAMPION)
    if champion is not None and release_of(champion) != release:
        client.set_registered_model_alias(model_name, PREVIOUS, champion.version)
    client.set_registered_model_alias(model_name, CHAMPION, version)
    candidate = version_of_alias(client, model_name, CANDIDATE)
    if candidate is not None and release_of(candidate) == release:
        client.delete_registered_model_alias(model_name, CANDIDATE)
    previous = version_of_alias(client, model_name, PREVIOUS)
    return None if previous is None else str(previous.version)


def last_order(client: mlflow.MlflowClient, model_name: str) -> int:
    """Number of the publication that set the aliases last; 0 before the first."""
    try:
        return int(client.get_registered_model(model_name).tags.get(_ORDER_TAG, 0))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return 0


def require_version(client: mlflow.MlflowClient, model_name: str, release: str) -> Any:
    """The model version that holds a release.

    Raises:
        ReleaseError: None does: it is another database, or one that lost it.
    """
    version = find_version(client, model_name, release)
    if version is None:
        raise ReleaseError(
            f"release {release}",
            expected=f"a version of {model_name!r} in the registry that holds it",
            got="none",
            remedy="set URM_MLFLOW_URI to the registry that has it, or run `urm release` again",
        )
    return client.get_model_version(model_name, version)


def require_alias(client: mlflow.MlflowClient, model_name: str, alias: str) -> Any:
    """The model version under an alias.

    Raises:
        ReleaseError: No version has it.
    """
    version = version_of_alias(client, model_name, alias)
    if version is None:
        raise ReleaseError(
            f"registered model {model_name!r}",
            expected=f"a version with the alias {alias!r}",
            got="none",
            remedy="promote two different releases first" if alias == PREVIOUS else "run `urm release` first",
        )
    return version


def open_registry(settings: Settings) -> mlflow.MlflowClient:
    """A client of the registry.

    Raises:
        ConfigError: It refuses requests by this host name or of this user.
        UnavailableError: It does not answer.
    """
    open_server(settings.tracking_uri)
    client = mlflow.MlflowClient()
    with mlflow_errors(settings.tracking_uri):
        client.search_registered_models(max_results=1)
    return client


def _log_version(bundle: Path, uri: str, manifest: Manifest, model_name: str, tags: dict[str, str]) -> str:
    """Make a version that has its tags from the first moment, so that it can be found by its release."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # An example would make MLflow load the whole bundle here; the smoke check runs real requests instead.
        warnings.filterwarnings("ignore", ".*input example was not provided.*", UserWarning)
        data = Path(folder) / "data"
        data.mkdir()
        (data / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes())
        pointer = {"bundle": uri, "release": manifest.release, "manifest": hash_manifest(bundle)}
        (data / POINTER).write_text(json.dumps(pointer, indent=2) + "\n")
        info = mlflow.pyfunc.log_model(
            name=model_name,
            loader_module="components.release.registered_model",
            data_path=str(data),
            signature=SIGNATURE,
            code_paths=[str(Path(components.__file__).parent)],  # the package travels with the model
            pip_requirements=_requirements(),
            metadata={"release": manifest.release, "bundle": uri},
            registered_model_name=model_name,
            tags=tags,
        )
    return str(info.registered_model_version)


def _requirements() -> list[str]:
    """What the package needs from an index to open a release: the core, the extra `worker`, and MLflow."""
    needed = [
        entry for entry in requires("urm-recall") or () if "extra ==" not in entry or 'extra == "worker"' in entry
    ]
    return [*(entry.partition(";")[0].strip() for entry in needed), f"mlflow=={mlflow.__version__}"]
