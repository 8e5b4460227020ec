"""The least that is a bundle: some files and their manifest. Nothing can be loaded from it."""

from datetime import UTC, datetime
from pathlib import Path

from components.release.bundle import GateVerdict, Manifest, describe_files, name_release, write_manifest


def make_bundle(folder: Path, files: dict[str, bytes]) -> Manifest:
    """Write the files under a folder, and a manifest of them; the manifest."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    entries, now = describe_files(folder), datetime(2026, 1, 1, tzinfo=UTC)
    manifest = Manifest(
        release=name_release("urm", entries),
        created_at=now,
        config="tiny",
        files=entries,
        feature_store="/somewhere",
        gate=GateVerdict(passed=True, verdict="good"),
        links={},
        history_length=3,
        day_origin=now,
    )
    write_manifest(folder, manifest)
    return manifest
