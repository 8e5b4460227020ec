"""The contract of a stage: what it reads and writes under a run directory, and when it counts as done.

    <run_dir>/<stage>/<fingerprint>/…   the stage's files, written to a temporary sibling and renamed
    <run_dir>/<stage>/result.json       written last: its presence is success
    <run_dir>/<stage>/progress.json     what a running stage last said of itself
    <parent of run_dir>/.stages/…       index of results by fingerprint, so that another run reuses equal work

A stage sees local paths only. Where the run directory is on an object store, inputs are fetched to the local
cache first and outputs are put there after the stage ends, through fsspec.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from components import __version__
from components.addresses import (
    absolute,
    exists,
    fetch,
    is_local,
    join,
    open_store,
    parent,
    read_json,
    remove,
    write_json,
)
from components.config import RunConfig
from components.exceptions import ConfigError, DataError, MissingInputError, UnavailableError
from components.settings import Settings

log = structlog.get_logger()


@dataclass(frozen=True)
class StageSpec:
    """What a stage depends on: the fingerprint of its result is made of exactly these.

    Attributes:
        name: Name in the flow, and of the folder under the run directory.
        inputs: Stages whose results it reads.
        sections: Sections of the configuration it reads, or single fields of one (`section.field`).
        packages: Sub-packages (or folders, relative to `components`) whose Python source decides its result.
        reusable: Whether an equal earlier result may stand in; false for acts on the world.
        parallel: Whether torchrun may start several processes of it.
    """

    name: str
    inputs: tuple[str, ...]
    sections: tuple[str, ...]
    packages: tuple[str, ...]
    reusable: bool = True
    parallel: bool = False


STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec("ingest", (), ("source",), ("ingestion",)),
        StageSpec("validate", ("ingest",), ("validation",), ("validation",)),
        StageSpec("features", ("validate",), ("features", "tasks"), ("features", "../feature_repo")),
        StageSpec("encode", ("validate",), ("items", "features"), ("items",)),
        StageSpec(
            "baseline",
            ("validate", "features", "encode"),
            ("baseline", "items", "tasks", "evaluation.k"),
            ("baseline", "items"),
        ),
        StageSpec("sft", ("features", "encode"), ("urm", "tasks", "evaluation.k"), ("urm", "items"), parallel=True),
        StageSpec(
            "evaluate",
            ("features", "baseline", "sft"),
            ("evaluation.k", "evaluation.bootstrap_samples", "evaluation.gate.confidence", "tasks"),
            ("evaluation", "urm", "items"),
        ),
        StageSpec("gate", ("evaluate",), ("evaluation",), ("evaluation",)),
        StageSpec(
            "release",
            ("validate", "features", "baseline", "sft", "evaluate", "gate"),
            ("release", "recall", "tasks"),
            ("release",),
            reusable=False,
        ),
        StageSpec("promote", ("release",), ("release",), ("release",), reusable=False),
    )
}


class StageResult(BaseModel):
    """Content of result.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    config: str
    fingerprint: str
    outputs: dict[str, str]  # name → URI of a file or folder
    counts: dict[str, int] = {}
    metrics: dict[str, Any] = {}
    seconds: float
    started_at: datetime
    finished_at: datetime
    version: str = __version__
    reused_from: str | None = None  # URI of the result.json whose work this run uses


@dataclass
class StageReport:
    """What a stage function returns: paths relative to its output folder, counts and metrics."""

    outputs: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageRun:
    """What a stage function is given.

    Attributes:
        spec: The stage.
        config: What the run is.
        settings: Where it runs.
        run_dir: URI of the run directory.
        folder: URI that the output folder will have.
        output: Empty local folder to write to.
        scratch: Local folder that survives a killed attempt (checkpoints); gone after success.
        inputs: Results of the stages it reads.
        previous: Last accepted result of this stage for this configuration's name, of any run.
        options: Flags of this call that are no part of the configuration.
    """

    spec: StageSpec
    config: RunConfig
    settings: Settings
    run_dir: str
    folder: str
    output: Path
    scratch: Path
    inputs: dict[str, StageResult]
    previous: StageResult | None
    options: dict[str, Any] = field(default_factory=dict)

    def path(self, stage: str, name: str) -> Path:
        """Local path of an earlier stage's output, fetched first if it is remote.

        Raises:
            MissingInputError: The stage has no such output, or it is gone.
        """
        try:
            uri = self.inputs[stage].outputs[name]
        except KeyError:
            raise MissingInputError(
                f"stage {self.spec.name}",
                expected=f"output {name!r} of stage {stage!r}",
                got="none",
                remedy=f"run `urm {stage}` again",
            ) from None
        return fetch(uri, self.settings.cache_path / "inputs")

    def report_progress(self, message: str, **metrics: float) -> None:
        """Say what the stage is doing; shown in the log and by `urm demo`. Of several processes only the first does."""
        if self.settings.process > 0:
            return
        log.info(message, stage=self.spec.name, **metrics)
        content = {"message": message, "metrics": metrics, "at": time.time()}
        try:
            write_json(join(self.run_dir, self.spec.name, "progress.json"), content)
        except OSError as error:  # hours of work do not end because nobody could be told of them
            log.warning("progress cannot be written", stage=self.spec.name, error=str(error))


StageFunction = Callable[[StageRun], StageReport]


def run_stage(
    stage: str | StageSpec,
    function: StageFunction,
    *,
    config: RunConfig,
    run_dir: str,
    settings: Settings,
    options: dict[str, Any] | None = None,
    force: bool = False,
) -> StageResult:
    """Run a stage once: reuse an equal result, or compute it and make it visible at once at the end.

    Of several processes that torchrun started, the first one does this, and the others only help it to compute.

    Args:
        stage: Name of a stage of the flow, or the specification of a study beside it.
        function: What computes it.
        config: What the run is.
        run_dir: Folder or URI of the run.
        settings: Where it runs.
        options: Flags that are no part of the configuration; they enter the fingerprint.
        force: Compute even if an equal result exists; that result's files stay, since other runs may use them.

    Raises:
        MissingInputError: An earlier stage has not succeeded in this run directory.
        DataError: The run directory cannot be written, or an input's result.json is damaged.
        UnavailableError: The stage is running in this run directory already.
        ConfigError: There are several processes of a stage that knows only one.
    """
    spec = STAGES[stage] if isinstance(stage, str) else stage
    _check_processes(spec, settings)
    stage = spec.name
    run_dir = absolute(run_dir)
    inputs = {name: _require(run_dir, stage, name) for name in spec.inputs}
    print_of_work = fingerprint(spec, config, inputs, options or {})
    result_uri = join(run_dir, stage, "result.json")
    index = join(parent(run_dir), ".stages")

    if spec.reusable and not force:
        done = _reusable(run_dir, stage, print_of_work, index)
        if done is not None:
            if done.reused_from:
                write_json(result_uri, done.model_dump(mode="json"))
            log.info("reused", stage=stage, result=done.reused_from or result_uri)
            return done

    started, clock = datetime.now(UTC), time.monotonic()
    folder = join(run_dir, stage, print_of_work[:16])
    if (force or not spec.reusable) and exists(folder):  # somebody may use what lies there
        folder = f"{folder}-{started:%Y%m%d%H%M%S}"
    with _Workspace(run_dir, stage, print_of_work, settings) as work:
        run = StageRun(
            spec=spec,
            config=config,
            settings=settings,
            run_dir=run_dir,
            folder=folder,
            output=work.output,
            scratch=work.scratch,
            inputs=inputs,
            previous=_recall(join(index, "latest", config.name, f"{stage}.json")),
            options=options or {},
        )
        if settings.process == 0:
            remove(result_uri)
        report = function(run)
        work.publish(folder, report.outputs)
    result = StageResult(
        stage=stage,
        config=config.name,
        fingerprint=print_of_work,
        outputs={name: join(folder, relative) for name, relative in report.outputs.items()},
        counts=report.counts,
        metrics=report.metrics,
        seconds=round(time.monotonic() - clock, 3),
        started_at=started,
        finished_at=datetime.now(UTC),
    )
    if settings.process == 0:
        _record(result, result_uri, index)
    return result


def _record(result: StageResult, result_uri: str, index: str) -> None:
    """Make a result visible, and known to other runs."""
    content = result.model_dump(mode="json")
    write_json(result_uri, content)
    log.info("done", stage=result.stage, seconds=result.seconds, **result.counts)
    try:
        write_json(join(index, result.stage, f"{result.fingerprint}.json"), content | {"reused_from": result_uri})
        write_json(join(index, "latest", result.config, f"{result.stage}.json"), content)
    except OSError as error:  # the result stands; only other runs will not find it
        log.warning("result is not in the index of runs", index=index, error=str(error))


def _check_processes(spec: StageSpec, settings: Settings) -> None:
    if settings.processes > 1 and not spec.parallel:
        raise ConfigError(
            f"stage {spec.name}",
            expected="one process",
            got=f"{settings.processes} (WORLD_SIZE)",
            remedy="start it without torchrun",
        )


def load_result(run_dir: str, stage: str) -> StageResult | None:
    """The result of a stage of a run, or None if it has not succeeded.

    Outputs that are named relative to the stage's folder, as those of a kept result are, come back as URIs.
    """
    folder = join(absolute(run_dir), stage)
    result = _load(join(folder, "result.json"))
    if result is None:
        return None
    outputs = {name: uri if _is_whole(uri) else join(folder, uri) for name, uri in result.outputs.items()}
    return result.model_copy(update={"outputs": outputs})


def fingerprint(spec: StageSpec, config: RunConfig, inputs: dict[str, StageResult], options: dict[str, Any]) -> str:
    """SHA-256 over everything that decides a stage's result: code, configuration, inputs, options."""
    root = Path(__file__).parent
    digest = hashlib.sha256(f"{spec.name} {__version__} {config.fingerprint(spec.sections)}".encode())
    for package in spec.packages:
        for source in sorted((root / package).rglob("*.py")):
            digest.update(str(source.relative_to(root)).encode() + source.read_bytes())
    for name in sorted(inputs):
        digest.update(f"{name}={inputs[name].fingerprint}".encode())
    digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()


class _Workspace:
    """Temporary output folder of one attempt, and the scratch folder that attempts share."""

    def __init__(self, run_dir: str, stage: str, print_of_work: str, settings: Settings) -> None:
        self.remote = not is_local(run_dir)
        base = settings.cache_path / "work" / hashlib.sha256(run_dir.encode()).hexdigest()[:12]
        self.root = base / stage if self.remote else Path(run_dir) / stage
        self.scratch = self.root / f".scratch-{print_of_work[:16]}"
        self.output = Path()
        self.leads = settings.process == 0
        self.lock: int | None = None

    def __enter__(self) -> _Workspace:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if self.leads:
                self._take_lock()
                for left_over in self.root.glob(".tmp-*"):
                    shutil.rmtree(left_over, ignore_errors=True)
            self.scratch.mkdir(exist_ok=True)
            self.output = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root if self.leads else None))
            self.output.chmod(0o755)
        except OSError as error:
            self._release_lock()
            raise _unwritable(self.root, error) from None
        return self

    def _take_lock(self) -> None:
        # The kernel drops the lock with the process, so that a killed attempt never blocks the next one.
        self.lock = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release_lock()
            raise UnavailableError(
                f"stage folder {self.root}",
                expected="one attempt at a time",
                got="another process at work in it",
                remedy="wait for it to end or use another --run-dir",
            ) from None

    def _release_lock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def publish(self, folder: str, outputs: dict[str, str]) -> None:
        for name, relative in outputs.items():
            if not (self.output / relative).exists():
                raise FileNotFoundError(f"stage {self.root.name} reports output {name!r} but wrote no {relative}")
        if not self.leads:
            return
        if self.remote:
            filesystem, path = open_store(folder)
            if filesystem.exists(path):
                filesystem.rm(path, recursive=True)
            filesystem.put(str(self.output) + "/", path, recursive=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(self.output, folder)
        for scratch in self.root.glob(".scratch-*"):
            shutil.rmtree(scratch, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        self._release_lock()


def _unwritable(path: object, error: OSError) -> DataError:
    return DataError(
        f"run directory {path}",
        expected="a folder that can be written",
        got=error.strerror or error,
        remedy="choose another --run-dir",
    )


def _require(run_dir: str, stage: str, needed: str) -> StageResult:
    result = load_result(run_dir, needed)
    if result is None:
        raise MissingInputError(
            f"stage {stage}",
            expected=f"the result of stage {needed!r} in {run_dir}",
            got="none",
            remedy=f"run `urm {needed}` with the same --config and --run-dir first",
        )
    return result


def _reusable(run_dir: str, stage: str, print_of_work: str, index: str) -> StageResult | None:
    for uri in (join(run_dir, stage, "result.json"), join(index, stage, f"{print_of_work}.json")):
        done = _recall(uri)
        if done is not None and done.fingerprint == print_of_work and _outputs_exist(done):
            return done
    return None


def _outputs_exist(result: StageResult) -> bool:
    return all(exists(uri) for uri in result.outputs.values())


def _recall(uri: str) -> StageResult | None:
    """An earlier result of the very stage that is about to run; a damaged one is as good as none."""
    try:
        return _load(uri)
    except DataError as error:
        log.warning("earlier result is damaged, not used", error=str(error))
        return None


def _is_whole(uri: str) -> bool:
    return uri.startswith("/") or "://" in uri


def _load(uri: str) -> StageResult | None:
    content = read_json(uri)
    if content is None:
        return None
    try:
        return StageResult.model_validate(content)
    except ValidationError as error:
        raise DataError(
            f"stage result {uri}",
            expected="a file written by this version",
            got=f"{error.error_count()} field(s) that do not fit",
            remedy="delete it and run the stage again",
        ) from None
