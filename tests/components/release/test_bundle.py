import json
from pathlib import Path

import pytest

from components.exceptions import ReleaseError
from components.release.bundle import (
    MANIFEST,
    FileEntry,
    describe_files,
    hash_manifest,
    name_release,
    read_manifest,
    verify,
    write_manifest,
)
from tests.worlds.bundles import make_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two files and their manifest."""
    make_bundle(tmp_path, {"model/weights": b"abc", "tasks.json": b"[]"})
    return tmp_path


def test_manifest_holds_digest_and_size_of_every_file(bundle: Path) -> None:
    manifest = verify(bundle)
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", from FIPS 180
    assert manifest.files["model/weights"] == FileEntry(sha256=digest, size=3)
    assert set(manifest.files) == {"model/weights", "tasks.json"}


def test_missing_altered_and_extra_files_are_named(bundle: Path) -> None:
    (bundle / "extra.txt").touch()
    with pytest.raises(ReleaseError, match=r"file extra\.txt: expected only files of the manifest, got an extra file"):
        verify(bundle)
    (bundle / "extra.txt").unlink()
    (bundle / "model" / "weights").write_bytes(b"abd")
    with pytest.raises(ReleaseError, match="file model/weights: expected SHA-256 ba7816bf8f01…, got a52d159f262b…"):
        verify(bundle)
    (bundle / "model" / "weights").write_bytes(b"abcd")
    with pytest.raises(ReleaseError, match="file model/weights: expected 3 bytes, got 4 bytes"):
        verify(bundle)
    (bundle / "model" / "weights").unlink()
    with pytest.raises(ReleaseError, match=r"file model/weights: expected a file of the manifest, got no such file"):
        verify(bundle)


def test_unknown_fields_are_ignored_and_other_formats_refused(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    assert content["format"] == 1
    (bundle / MANIFEST).write_text(json.dumps(content | {"later": 1}))
    assert read_manifest(bundle).release == content["release"]
    for found, got in ((2, "format 2; upgrade"), (None, "no format; build the release again")):
        (bundle / MANIFEST).write_text(json.dumps(content | {"format": found}))
        with pytest.raises(ReleaseError, match=f"manifest.json: expected format 1, got {got}"):
            read_manifest(bundle)


def test_damaged_manifest_is_named(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**content, "history_length": "many"}))
    with pytest.raises(ReleaseError, match=r"manifest\.json: expected a valid field 'history_length'"):
        read_manifest(bundle)
    (bundle / MANIFEST).write_text("{")
    with pytest.raises(ReleaseError, match=r"manifest\.json: expected JSON"):
        read_manifest(bundle)
    (bundle / MANIFEST).unlink()
    with pytest.raises(ReleaseError, match=r"manifest\.json: expected a readable manifest, got No such file"):
        read_manifest(bundle)


def test_name_is_a_function_of_content_and_paths() -> None:
    one = {"a": FileEntry(sha256="1", size=1), "b": FileEntry(sha256="2", size=1)}
    swapped = {"a": one["b"], "b": one["a"]}
    assert name_release("urm", one) == name_release("urm", dict(reversed(one.items())))
    assert name_release("urm", one) != name_release("urm", swapped)


def test_a_manifest_other_than_the_published_one_is_refused(bundle: Path) -> None:
    """Whoever may write the bundle could change a file together with its line in the manifest."""
    digest = hash_manifest(bundle)
    assert verify(bundle, digest) == verify(bundle)
    (bundle / "model" / "weights").write_bytes(b"evil")
    write_manifest(bundle, read_manifest(bundle).model_copy(update={"files": describe_files(bundle)}))
    for read in (verify, read_manifest):
        with pytest.raises(ReleaseError, match=r"expected the name that its files give the release, urm-\w+, got urm-"):
            read(bundle)  # its name says so even where no digest is known
        with pytest.raises(ReleaseError, match=f"manifest.json: expected SHA-256 {digest[:12]}…, as it was published"):
            read(bundle, digest)
