"""A published release on this machine: bundle and feature store fetched into the cache and verified. No torch.

An init container does it for the workers of its pod (`urm recall fetch`); they find everything under the same keys.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.addresses import checked_copy, fetch
from components.exceptions import ReleaseError
from components.features.store import hash_registry, online_files
from components.features.users import SOURCE, read_users
from components.release.bundle import Manifest, read_manifest, verify
from components.release.publication import Publication
from components.settings import Settings


@dataclass(frozen=True)
class FetchedRelease:
    """Local folders of a release.

    Attributes:
        bundle: Its bundle, every file verified.
        manifest: What that says.
        features: The Feast folder, what online reads need of it, with the definitions that the release was made with.
    """

    bundle: Path
    manifest: Manifest
    features: Path


def fetch_release(publication: Publication, settings: Settings) -> FetchedRelease:
    """Fetch what is not in the cache yet, and verify it.

    Raises:
        ReleaseError: A file is missing, altered or extra, or the bundle or feature store is another release's.
        UrmError: The bundle or the feature store cannot be reached.
    """
    settings.require_allowed(publication.bundle)
    bundle = fetch(publication.bundle, settings.cache_path / "bundles" / publication.manifest[:16])
    with checked_copy(publication.bundle, bundle):
        manifest = verify(bundle, publication.manifest)
        manifest.require(publication.release, publication.bundle)
    settings.require_allowed(manifest.feature_store)
    features = fetch(manifest.feature_store, settings.cache_path / "features", online_files(settings))
    with checked_copy(manifest.feature_store, features):
        if manifest.feature_registry and hash_registry(features) != manifest.feature_registry:
            raise ReleaseError(
                f"feature store {features}",
                expected="the definitions that the release was made with",
                got="others in its registry.db",
                remedy="build the release again",
            )
    return FetchedRelease(bundle, manifest, features)


def list_users(publication: Publication, settings: Settings) -> Iterator[str]:
    """Every user whom the features of a release know, once; the file that names them is fetched first.

    Raises:
        ReleaseError: The bundle is not the one that was published.
        UrmError: The bundle or the feature store cannot be reached.
    """
    settings.require_allowed(publication.bundle)
    bundle = fetch(publication.bundle, settings.cache_path / "bundles" / publication.manifest[:16])
    with checked_copy(publication.bundle, bundle):
        manifest = read_manifest(bundle, publication.manifest)
    settings.require_allowed(manifest.feature_store)
    return read_users(fetch(manifest.feature_store, settings.cache_path / "features", (SOURCE,)))


def fill_cache(publication: Publication, settings: Settings) -> FetchedRelease:
    """Fetch a release into a cache that no other process uses meanwhile.

    What a killed process left there is removed first, and so are copies that turn out wrong: a retry starts afresh.

    Raises:
        ReleaseError: As `fetch_release`.
        UrmError: As `fetch_release`.
    """
    cache = settings.cache_path
    for unfinished in (*cache.glob("bundles/*/.tmp-*"), *cache.glob("features/.tmp-*")):
        shutil.rmtree(unfinished)
    try:
        return fetch_release(publication, settings)
    except ReleaseError:
        for name in ("bundles", "features"):
            shutil.rmtree(cache / name, ignore_errors=True)
        raise
