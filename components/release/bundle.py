"""The release bundle: one folder that is released, served and rolled back as a whole.

    model/           URM: backbone and heads, safetensors
    item_table/      frozen item vectors by key, memory-mapped
    index.faiss      the catalogue's vectors, searchable by inner product
    tasks.json       the tasks, resolved
    titles.parquet   item_id, external_id, title, category, brand, price, available: what the API shows and looks up,
                     and serving filters by
    fallback.parquet popular items per task, for users without a result
    smoke.json       requests of evaluation's users with the items that evaluation saw
    manifest.json    SHA-256 and size of every file above, the release's name and where it comes from

The release stage writes it; the recall runtime verifies and reads it, and imports this module for that (ADR 5).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ConfigDict, TypeAdapter, ValidationError

from components.config import Task
from components.exceptions import GateError, ReleaseError

MANIFEST = "manifest.json"
FORMAT = 1  # of a bundle; a worker reads no other
NAME_DIGITS = 12  # of the content digest, in a release's name
_BLOCK_BYTES = 1 << 20

TITLES = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("external_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("category", pa.list_(pa.string()), nullable=False),
        pa.field("brand", pa.string()),
        pa.field("price", pa.float64()),
        pa.field("available", pa.bool_(), nullable=False),
    ]
)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)  # fields that are not known here are ignored


class FileEntry(_Model):
    """One file of the bundle."""

    sha256: str
    size: int  # bytes


class GateVerdict(_Model):
    """What the gate said, and whether the release was made in spite of it."""

    passed: bool
    verdict: str
    promoted_anyway: bool = False

    @classmethod
    def judge(cls, verdict: dict[str, Any], anyway: bool) -> GateVerdict:
        """The verdict, if it allows a release.

        Args:
            verdict: As the gate wrote it.
            anyway: Whether to release even if it failed.

        Raises:
            GateError: It does not allow one.
        """
        passed = bool(verdict["passed"])
        if not passed and not anyway:
            raise GateError(
                "release",
                expected="a passed gate",
                got="a failed one: " + "; ".join(str(reason).rstrip(".") for reason in verdict["reasons"]),
                remedy="improve the model, or see the rest of the chain with --promote-anyway",
            )
        return cls(passed=passed, verdict=verdict["verdict"], promoted_anyway=anyway and not passed)


class IndexNote(_Model):
    """What kind of index the bundle holds, and what it finds.

    Attributes:
        kind: exact, ivf_sq8 or pq.
        items: Candidates in it.
        recall: Share of the exact top-k that comes back, mean over the smoke requests; 1 of an exact index.
        requests: Smoke requests that this was measured on; 0 where nothing had to be.
        k: Items per request.
    """

    kind: str = "exact"
    items: int = 0
    recall: float = 1.0
    requests: int = 0
    k: int = 0


class Manifest(_Model):
    """Content of manifest.json.

    Attributes:
        format: Form of the bundle; a change that older workers cannot read gives it another number.
        release: Name made of the model's name and a digest of the content: equal content, equal name.
        files: Every file of the bundle but this one, by its path relative to the bundle.
        feature_store: URI of the Feast folder; not copied, because the online store goes on changing.
        gate: The gate's verdict.
        links: Addresses that lead back: run directory, MLflow run, Airflow run.
        history_length: Items of a user's history that the features hold.
        day_origin: An instant at which a day begins for the features' count of active days.
        index: Kind of the index.
        feature_registry: SHA-256 of the definitions in the Feast folder; empty where there is no registry in it.
    """

    format: int = FORMAT
    release: str
    created_at: AwareDatetime
    config: str
    files: dict[str, FileEntry]
    feature_store: str
    gate: GateVerdict
    links: dict[str, str]
    history_length: int
    day_origin: AwareDatetime
    index: IndexNote = IndexNote()
    feature_registry: str = ""

    def require(self, release: str, uri: str) -> None:
        """Refuse a bundle that holds another release than the one asked for at that URI.

        Raises:
            ReleaseError: It is another release's.
        """
        if self.release != release:
            raise ReleaseError(f"bundle {uri}", expected=f"release {release}", got=self.release, remedy="promote again")

    def tags(self, uri: str) -> dict[str, str]:
        """Tags of the registered version and of the MLflow run, for a bundle at a URI."""
        return {
            "urm.release": self.release,
            "urm.bundle": uri,
            "urm.feature_store": self.feature_store,
            "urm.config": self.config,
            "urm.gate": "passed" if self.gate.passed else "failed, promoted anyway",
            "urm.gate_verdict": self.gate.verdict[:5000],
            **{f"urm.{name}": link for name, link in self.links.items()},
        }


class SmokeRequest(_Model):
    """One request with the items that evaluation saw for it.

    Attributes:
        context: A row of the table CONTEXTS.
        task: Name of the task asked.
        query: The user's words, where the task needs them.
        item_ids: Evaluation's top items, best first.
    """

    context: dict[str, Any]
    task: str
    query: str | None
    item_ids: list[int]


def describe_files(bundle: Path) -> dict[str, FileEntry]:
    """SHA-256 and size of every file under the bundle, the manifest left out."""
    return {
        path.relative_to(bundle).as_posix(): FileEntry(sha256=_sha256(path), size=path.stat().st_size)
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path != bundle / MANIFEST
    }


def name_release(model_name: str, files: Mapping[str, FileEntry]) -> str:
    """The release's name; it is a function of the content."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path} {files[path].sha256}\n".encode())
    return f"{model_name}-{digest.hexdigest()[:NAME_DIGITS]}"


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write manifest.json, the last file of a bundle."""
    (bundle / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n")


def hash_manifest(bundle: Path) -> str:
    """SHA-256 of manifest.json, and through it of every file of the bundle.

    Raises:
        ReleaseError: It is missing.
    """
    try:
        return _sha256(bundle / MANIFEST)
    except OSError as error:
        raise _refuse(bundle, MANIFEST, "a readable manifest", error.strerror) from None


def read_manifest(bundle: Path, digest: str = "") -> Manifest:
    """Read manifest.json without checking the files, but that they are those of the release's name.

    Args:
        bundle: The bundle.
        digest: What its SHA-256 must be; empty where nothing is known of it.

    Raises:
        ReleaseError: It is missing, damaged or another one, or its files are another release's.
    """
    found = hash_manifest(bundle)
    if digest not in ("", found):
        raise _refuse(bundle, MANIFEST, f"SHA-256 {digest[:12]}…, as it was published", f"{found[:12]}…")
    try:
        content = (bundle / MANIFEST).read_bytes()
        _require_format(bundle, content)
        manifest = Manifest.model_validate_json(content)
    except OSError as error:
        raise _refuse(bundle, MANIFEST, "a readable manifest", error.strerror) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise _refuse(bundle, MANIFEST, f"a valid field {field!r}" if field else "JSON", first["msg"]) from None
    name = name_release(manifest.release.rpartition("-")[0], manifest.files)
    if manifest.release != name:
        raise _refuse(bundle, MANIFEST, f"the name that its files give the release, {name}", manifest.release)
    return manifest


def _require_format(bundle: Path, content: bytes) -> None:
    """Refuse a bundle of another format; content that is no JSON object is left to the manifest's own checks."""
    try:
        found = json.loads(content).get("format")
    except (ValueError, AttributeError):
        return
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        raise ReleaseError(
            f"bundle {bundle}, file {MANIFEST}",
            expected=f"format {FORMAT}",
            got=f"format {found}" if found is not None else "no format",
            remedy="upgrade what reads it first" if newer else "build the release again with `urm release`",
        )


def verify(bundle: Path, digest: str = "") -> Manifest:
    """Check every file against the manifest, and that against its digest, where one is known.

    Returns:
        The manifest.

    Raises:
        ReleaseError: A file is missing, altered, or not in the manifest; the message names the first such file.
    """
    manifest = read_manifest(bundle, digest)
    present = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if not path.is_dir()} - {MANIFEST}
    for name in sorted(manifest.files.keys() - present):
        raise _refuse(bundle, name, "a file of the manifest", "no such file")
    for name in sorted(present - manifest.files.keys()):
        raise _refuse(bundle, name, "only files of the manifest", "an extra file")
    verify_files(bundle, manifest, manifest.files)
    return manifest


def verify_files(bundle: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check some files against the manifest.

    Raises:
        ReleaseError: One is missing or altered.
    """
    for name in names:
        entry = manifest.files.get(name)
        if entry is None or not (bundle / name).is_file():
            raise _refuse(bundle, name, "a file of the manifest", "no such file")
        size = (bundle / name).stat().st_size
        if size != entry.size:
            raise _refuse(bundle, name, f"{entry.size} bytes", f"{size} bytes")
        digest = _sha256(bundle / name)
        if digest != entry.sha256:
            raise _refuse(bundle, name, f"SHA-256 {entry.sha256[:12]}…", f"{digest[:12]}…")


def write_tasks(bundle: Path, tasks: tuple[Task, ...]) -> None:
    """Write tasks.json."""
    content = [task.model_dump(mode="json") for task in tasks]
    (bundle / "tasks.json").write_text(json.dumps(content, indent=2) + "\n")


def read_tasks(bundle: Path) -> tuple[Task, ...]:
    """The tasks of a bundle.

    Raises:
        ReleaseError: tasks.json is damaged.
    """
    try:
        return TypeAdapter(tuple[Task, ...]).validate_json((bundle / "tasks.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise _refuse(bundle, "tasks.json", "a list of tasks", " ".join(str(error).split())) from None


def write_smoke(bundle: Path, requests: list[SmokeRequest]) -> None:
    """Write smoke.json."""
    content = [request.model_dump(mode="json") for request in requests]
    (bundle / "smoke.json").write_text(json.dumps(content) + "\n")


def read_smoke(bundle: Path) -> list[SmokeRequest]:
    """The smoke requests of a bundle.

    Raises:
        ReleaseError: smoke.json is damaged.
    """
    try:
        return TypeAdapter(list[SmokeRequest]).validate_json((bundle / "smoke.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise _refuse(bundle, "smoke.json", "a list of requests", " ".join(str(error).split())) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _refuse(bundle: Path, name: str, expected: str, got: object) -> ReleaseError:
    return ReleaseError(
        f"bundle {bundle}, file {name}", expected=expected, got=got, remedy="build the release again with `urm release`"
    )
