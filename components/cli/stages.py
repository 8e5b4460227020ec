"""One command per stage, derived from the table of the flow."""

import hashlib
import inspect
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from components.addresses import absolute, fetch
from components.cli.options import DEFAULT_CONFIG, ConfigOption, ForceOption, RunDirOption, SetOption, read_config
from components.config import RunConfig
from components.flow import STAGES, StageSpec
from components.memory import import_quickly, keep_freed_memory
from components.settings import Settings, get_settings
from components.storage import StageFunction, StageReport, StageResult, StageRun, require_result, run_stage

app = typer.Typer(no_args_is_help=True)
_PANEL = "Stages, in order"

CheckOption = Annotated[bool, typer.Option("--check", help="Only report what is wrong with the source.")]


def run_spec(
    spec: StageSpec,
    config: str,
    run_dir: str,
    overrides: list[str] | None,
    force: bool = False,
    *,
    options: dict[str, Any] | None = None,
    function: StageFunction | None = None,
) -> StageResult:
    """Run a stage or a study as its command's options say.

    `options` are no part of the configuration and decide the result, too, as the content of model folders does;
    `function` computes it, by default `run` of the stage's module.
    """
    keep_freed_memory()
    settings, run_config = get_settings(), read_config(config, overrides)

    def compute(stage: StageRun) -> StageReport:
        # Imported only now, since it may take seconds: a reused result or a missing input needs none of it.
        report: StageReport = (function or import_quickly(spec.entry).run)(stage)
        return report

    return run_stage(
        spec,
        compute,
        config=run_config,
        run_dir=settings.find_run_dir(run_dir),
        settings=settings,
        options=(options or {}) | fingerprint_models(spec, run_config),
        force=force,
    )


def fingerprint_models(spec: StageSpec, config: RunConfig) -> dict[str, str]:
    """By field, a SHA-256 over each folder with a model that the stage reads; packaged ones do not change."""
    named = {"items.text_encoder": config.items.text_encoder, "urm.backbone": config.urm.backbone}
    found = {}
    for field, folder in named.items():
        if Path(folder).is_dir() and any(f"{field}.".startswith(f"{section}.") for section in spec.sections):
            found[field] = _digest(Path(folder), "*")
    return found


def _digest(folder: Path, pattern: str) -> str:
    """SHA-256 of names and contents of the files below a folder that match."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def ingest(
    config: ConfigOption = DEFAULT_CONFIG,
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
    check: CheckOption = False,
) -> None:
    """By hand for `--check`, and because the source's files decide the result."""
    source = read_config(config, set_).source
    if check:
        from components.ingestion.check import check_source

        report = check_source(source, get_settings())
        typer.echo(report.text)
        raise typer.Exit(0 if report.passed else 2)
    from components.ingestion.files import fingerprint_files

    run_spec(STAGES["ingest"], config, run_dir, set_, force, options={"source_files": fingerprint_files(source)})


def encode(
    config: ConfigOption = DEFAULT_CONFIG,
    run_dir: RunDirOption = "default",
    set_: SetOption = None,
    force: ForceOption = False,
) -> None:
    """By hand because the files of the images decide the result."""
    options = {}
    if read_config(config, set_).items.image_encoder:
        from components.items.image_files import fingerprint_images

        settings = get_settings()
        uri = require_result(absolute(settings.find_run_dir(run_dir)), "validate", "encode").outputs["items"]
        options["images"] = fingerprint_images(fetch(uri, settings.cache_path / "inputs"))
    run_spec(STAGES["encode"], config, run_dir, set_, force, options=options)


def _require_fresh_events(result: StageResult, config: str, overrides: list[str] | None) -> None:
    from components.validation.freshness import NEWEST_EVENT, require_fresh

    require_fresh(result.metrics[NEWEST_EVENT], read_config(config, overrides).validation, datetime.now(UTC))


def _print_verdict(result: StageResult, config: str, overrides: list[str] | None) -> None:
    typer.echo(result.metrics["verdict"])


_BY_HAND: dict[str, Callable[..., None]] = {"ingest": ingest, "encode": encode}
# What of the settings decides a stage's result, too.
_DECIDING_SETTINGS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "features": lambda settings: {
        "feature_environment": settings.feature_environment,
        "feature_definitions": _digest(settings.feature_repo_dir, "*.py"),
    }
}
# What a command does once its result is there, computed or reused.
_AFTERWARDS: dict[str, Callable[[StageResult, str, list[str] | None], None]] = {
    "validate": _require_fresh_events,
    "gate": _print_verdict,
}


def _derive(spec: StageSpec) -> Callable[..., None]:
    """The command of a stage: the common options, and an option per flag."""

    def command(**given: Any) -> None:
        config, overrides = given["config"], given["set_"]
        flags = {name: given[name] for name in spec.flags}
        if spec.name in _DECIDING_SETTINGS:
            flags |= _DECIDING_SETTINGS[spec.name](get_settings())
        result = run_spec(spec, config, given["run_dir"], overrides, given["force"], options=flags)
        if spec.name in _AFTERWARDS:
            _AFTERWARDS[spec.name](result, config, overrides)

    types = {"config": ConfigOption, "run_dir": RunDirOption, "set_": SetOption, "force": ForceOption}
    values = {"config": DEFAULT_CONFIG, "run_dir": "default", "set_": None, "force": False}
    for name, help_text in spec.flags.items():
        types[name] = Annotated[bool, typer.Option(f"--{name.replace('_', '-')}", help=help_text)]
        values[name] = False
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what Typer reads options from
        [inspect.Parameter(name, keyword, default=values[name], annotation=types[name]) for name in types]
    )
    command.__annotations__ = dict(types)
    return command


for _spec in STAGES.values():
    _command = _BY_HAND.get(_spec.name) or _derive(_spec)
    app.command(name=_spec.name, help=_spec.summary, rich_help_panel=_PANEL)(_command)
