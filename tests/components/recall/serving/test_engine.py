import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.exceptions import ReleaseError, UserError
from components.recall.serving.context import build_context
from components.recall.serving.engine import ServingRelease, load_release
from components.release.bundle import describe_files, name_release, read_manifest, write_manifest
from components.release.publication import Publication
from components.urm.data.request import RecallRequest
from components.urm.inference import UrmRecaller
from tests.worlds.recall import Release
from tests.worlds.tiny import LAST_EVENT, NUM_KNOWN, known_items


def load(release: Release, bundle: Path | None = None, name: str | None = None) -> ServingRelease:
    publication = Publication(release=name or release.name, bundle=str(bundle or release.bundle), order=1)
    return load_release(publication, release.settings, release.config.release)


def remake(bundle: Path) -> str:
    """Write a manifest that fits the files as they are; returns the release's name."""
    manifest = read_manifest(bundle)
    files = describe_files(bundle)
    name = name_release("urm", files)
    write_manifest(bundle, manifest.model_copy(update={"files": files, "release": name}))
    return name


def replace_index(bundle: Path, change: float) -> None:
    """Shift or spoil the candidate vectors, in files of their own."""
    index = faiss.read_index(str(bundle / "index.faiss"))
    keys = faiss.vector_to_array(index.id_map)
    vectors = index.reconstruct_batch(keys)
    vectors[: len(vectors) // 2] *= change
    spoilt = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    spoilt.add_with_ids(vectors, keys)
    (bundle / "index.faiss").unlink()
    faiss.write_index(spoilt, str(bundle / "index.faiss"))


def test_a_bundle_with_another_manifest_is_not_the_one_that_was_verified(releases: tuple[Release, Release]) -> None:
    release = load(releases[0])
    assert release.same_bundle(release.publication)
    assert not release.same_bundle(release.publication.model_copy(update={"manifest": "0" * 64}))


def test_loaded_release_answers_as_the_recaller_of_the_training_does(releases: tuple[Release, Release]) -> None:
    release = load(releases[0])
    sft = releases[0].run_dir / "sft"
    plain = UrmRecaller.load(sft / "model", sft / "item_table", sft / "candidates")
    known = release.read_histories(["3", "nobody"])
    assert list(known["3"].items) == known_items(3)
    assert known["3"].num_events == NUM_KNOWN
    assert known["3"].as_of_us == int(LAST_EVENT.timestamp() * 1e6) + 1
    assert known["nobody"].items == {}
    context = build_context(known["3"], [], release.rule)
    requests = [RecallRequest(context, task, "shelf 3" if task.needs_query else None) for task in release.tasks]
    items, scores = plain.recall(requests, 10)
    for (got_items, got_scores), want_items, want_scores in zip(
        release.recommend(requests, 10), items, scores, strict=True
    ):
        assert got_items == want_items.tolist()
        assert got_scores == pytest.approx(want_scores.tolist())


def test_items_without_a_row_are_counted(releases: tuple[Release, Release]) -> None:
    assert load(releases[0]).count_unknown([1000, 999_999]) == 1
    assert load(releases[0]).count_unknown([]) == 0


def test_altered_file_is_refused(releases: tuple[Release, Release], broken_bundle: Path) -> None:
    path = broken_bundle / "model" / "urm.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReleaseError, match=r"file model/urm\.safetensors: expected SHA-256"):
        load(releases[1], broken_bundle)


def test_features_defined_otherwise_are_refused(releases: tuple[Release, Release], broken_bundle: Path) -> None:
    manifest = read_manifest(broken_bundle)
    assert len(manifest.feature_registry) == 64
    write_manifest(broken_bundle, manifest.model_copy(update={"feature_registry": "0" * 64}))
    with pytest.raises(ReleaseError, match=r"feature store .* expected the definitions that the release was made with"):
        load(releases[1], broken_bundle)


def test_bundle_of_another_release_is_refused(releases: tuple[Release, Release]) -> None:
    with pytest.raises(ReleaseError, match=f"expected release urm-other, got {releases[0].name}"):
        load(releases[0], name="urm-other")


def test_model_that_gives_nan_is_refused(releases: tuple[Release, Release], broken_bundle: Path) -> None:
    path = broken_bundle / "model" / "urm.safetensors"
    weights = load_file(path)
    weights["user_head.project.bias"] = torch.full_like(weights["user_head.project.bias"], torch.nan)
    path.unlink()
    save_file(weights, path)
    with pytest.raises(ReleaseError, match="expected finite user vectors, got 9 of 9 requests without"):
        load(releases[1], broken_bundle, remake(broken_bundle))


def test_index_with_nan_is_refused(releases: tuple[Release, Release], broken_bundle: Path) -> None:
    replace_index(broken_bundle, np.nan)  # a search never returns such items, so that others take their places
    with pytest.raises(ReleaseError, match="smoke check"):
        load(releases[1], broken_bundle, remake(broken_bundle))


def test_results_unlike_those_of_evaluation_are_refused(releases: tuple[Release, Release], broken_bundle: Path) -> None:
    replace_index(broken_bundle, -3.0)
    with pytest.raises(ReleaseError, match=r"smoke check .* share of at least 0\.9 .* over 9 requests"):
        load(releases[1], broken_bundle, remake(broken_bundle))


def test_files_that_do_not_fit_together_are_refused(releases: tuple[Release, Release], broken_bundle: Path) -> None:
    shutil.rmtree(broken_bundle / "model" / "backbone")
    with pytest.raises(UserError, match="backbone"):
        load(releases[1], broken_bundle, remake(broken_bundle))
    (broken_bundle / "index.faiss").write_bytes(b"no index")
    shutil.copytree(releases[1].bundle / "model" / "backbone", broken_bundle / "model" / "backbone")
    with pytest.raises(ReleaseError, match="expected a model that loads"):
        load(releases[1], broken_bundle, remake(broken_bundle))
