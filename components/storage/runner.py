"""Runs a stage: reuse of equal work, or computation that becomes visible at once at the end."""

import time
from datetime import UTC, datetime
from typing import Any

import structlog

from components.addresses import absolute, exists, join, remove, write_json
from components.config import RunConfig
from components.exceptions import ConfigError, full_disk_errors
from components.flow import STAGES, StageSpec, stages_before
from components.settings import Settings
from components.storage.code import fingerprint
from components.storage.contract import StageFunction, StageReport, StageResult, StageRun
from components.storage.results import (
    find_equal,
    index_of_runs,
    is_whole,
    latest_uri,
    read_earlier,
    record_result,
    require_result,
)
from components.storage.workspace import Workspace

log = structlog.get_logger()


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

    Of several processes that torchrun started, the first one does this, and the others only help it to compute. The
    stage is one of the flow by name, or the specification of a study beside it. `options` are flags that are no part of
    the configuration; they enter the fingerprint. `force` computes even if an equal result exists; that result's files
    stay, since other runs may use them.

    Raises:
        MissingInputError: An earlier stage has not succeeded in this run directory.
        DataError: The run directory cannot be written, or an input's result.json is damaged.
        UnavailableError: The stage is running in this run directory already, or the disk is full.
        ConfigError: There are several processes of a stage that knows only one; or what the stage reads was made by
            other settings.
    """
    spec = STAGES[stage] if isinstance(stage, str) else stage
    _check_processes(spec, settings)
    stage = spec.name
    run_dir = absolute(run_dir)
    inputs = {name: require_result(run_dir, name, stage) for name in spec.inputs}
    _require_settings(spec, config, run_dir)
    work_fingerprint = fingerprint(spec, config, inputs, options or {})
    result_uri = join(run_dir, stage, "result.json")
    index = index_of_runs(run_dir)
    latest = latest_uri(index, config, stage)

    equal = find_equal(run_dir, stage, work_fingerprint, index)
    if spec.reusable and not force:
        done = next(filter(is_whole, equal), None)
        if done is not None:
            if done.reused_from:
                write_json(result_uri, done.model_dump(mode="json"))
            log.info("reused", stage=stage, result=done.reused_from or result_uri)
            return done

    started, clock = datetime.now(UTC), time.monotonic()
    folder = join(run_dir, stage, work_fingerprint[:16])
    taken = (force or not spec.reusable) and exists(folder)  # somebody may use what lies there
    if taken:
        folder = f"{folder}-{started:%Y%m%d%H%M%S}"
    with (
        full_disk_errors(f"disk of {run_dir}", "the stage's files"),
        Workspace(run_dir, stage, work_fingerprint, settings) as work,
    ):
        # Another attempt may be about to write to the folder of that name, or machines have fetched what lay there.
        if work.succeeds_another or (work.remote and equal and not taken):
            folder = f"{folder}-{work.attempt[:8]}"
        run = StageRun(
            spec=spec,
            config=config,
            settings=settings,
            run_dir=run_dir,
            folder=folder,
            output=work.output,
            scratch=work.scratch,
            inputs=inputs,
            previous=read_earlier(latest),
            options=options or {},
            checkpoints=work.checkpoints,
            is_current=work.is_current,
        )
        if settings.process == 0:
            remove(result_uri)
        report = function(run)
        if settings.process == 0:
            _check_report(spec, report)
        work.publish(folder, report.outputs)
        announced = report.announce() if report.announce and settings.process == 0 else {}
        result = StageResult(
            stage=stage,
            config=config.name,
            fingerprint=work_fingerprint,
            outputs={name: join(folder, relative) for name, relative in report.outputs.items()},
            counts=report.counts,
            metrics=report.metrics | announced,
            seconds=round(time.monotonic() - clock, 3),
            started_at=started,
            finished_at=datetime.now(UTC),
            made_with=config.fingerprint(spec.sections),
        )
        if settings.process == 0:
            record_result(result, result_uri, index, latest)
        work.remove_checkpoints()
    return result


def _check_processes(spec: StageSpec, settings: Settings) -> None:
    if settings.processes > 1 and not spec.parallel:
        raise ConfigError(
            f"stage {spec.name}",
            expected="one process",
            got=f"{settings.processes} (WORLD_SIZE)",
            remedy="start it without torchrun",
        )


def _require_settings(spec: StageSpec, config: RunConfig, run_dir: str) -> None:
    """Refuse a configuration other than the one by which earlier stages made what the stage reads.

    A release is read as it is: its bundle says what it was made with.
    """
    for name in () if "release" in spec.inputs else stages_before(spec.inputs):
        earlier = read_earlier(join(run_dir, name, "result.json"))
        sections = STAGES[name].sections
        if earlier is not None and earlier.made_with not in ("", config.fingerprint(sections)):
            raise ConfigError(
                f"stage {spec.name}",
                expected=f"the settings of {', '.join((*sections, 'seed'))} by which {name!r} ran in {run_dir}",
                got=f"others ({config.name})",
                remedy=f"give the same --config and --set (and version), or run `urm {name}` and what follows again",
            )


def _check_report(spec: StageSpec, report: StageReport) -> None:
    """Compare what a stage reports with what the flow promises of it: others read it by these names."""
    missing = spec.outputs.keys() - report.outputs.keys() - set(spec.optional)
    unknown = report.outputs.keys() - spec.outputs.keys()
    if missing or unknown:
        raise RuntimeError(
            f"stage {spec.name}: expected the outputs {', '.join(spec.outputs)} (components/flow.py), "
            f"got {', '.join(report.outputs) or 'none'}; make the report and the table agree."
        )
