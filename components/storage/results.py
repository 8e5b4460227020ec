"""Results of stages: reading, requiring, reusing, recording."""

from typing import Any

import structlog
from pydantic import ValidationError

from components.addresses import absolute, exists, join, open_store, parent, read_json, store_errors, write_json
from components.config import RunConfig
from components.exceptions import DataError, MissingInputError, UnavailableError
from components.storage.contract import StageResult

log = structlog.get_logger()


def index_of_runs(run_dir: str) -> str:
    """Where the results of all runs beside this one are found by fingerprint."""
    return join(parent(run_dir), ".stages")


def latest_uri(index: str, config: RunConfig, stage: str) -> str:
    """Where the newest result of a stage is kept, of all runs by a configuration's name and source."""
    source = config.model_copy(update={"seed": 0}).fingerprint(("source",))
    return join(index, "latest", config.name, f"{stage}-{source[:16]}.json")


def record_result(result: StageResult, result_uri: str, index: str, latest: str) -> None:
    """Make a result visible, and known to other runs: `latest` is its `latest_uri`."""
    content = result.model_dump(mode="json")
    write_json(result_uri, content)
    log.info("done", stage=result.stage, seconds=result.seconds, **result.counts)
    try:
        write_json(join(index, result.stage, f"{result.fingerprint}.json"), content | {"reused_from": result_uri})
        write_json(latest, content)
    except (OSError, UnavailableError) as error:  # the result stands; only other runs will not find it
        log.warning("result is not in the index of runs", index=index, error=str(error))


def load_result(run_dir: str, stage: str) -> StageResult | None:
    """The result of a stage of a run, or None if it has not succeeded.

    Outputs that are named relative to the stage's folder, as those of a kept result are, come back as URIs.
    """
    folder = join(absolute(run_dir), stage)
    result = _load(join(folder, "result.json"))
    if result is None:
        return None
    outputs = {
        name: uri if uri.startswith("/") or "://" in uri else join(folder, uri) for name, uri in result.outputs.items()
    }
    return result.model_copy(update={"outputs": outputs})


def require_result(run_dir: str, stage: str, reader: str = "") -> StageResult:
    """The result of a stage of a run; the message names the stage that reads it, if given.

    Raises:
        MissingInputError: The stage has not succeeded in this run.
    """
    result = load_result(run_dir, stage)
    if result is None:
        subject, place = (f"stage {reader}", f" in {run_dir}") if reader else (f"run {run_dir}", "")
        raise MissingInputError(
            subject,
            expected=f"the result of stage {stage!r}{place}",
            got="none",
            remedy=f"run `urm {stage}` with the same --config and --run-dir first",
        )
    return result


def require_json(run_dir: str, stage: str, output: str) -> dict[str, Any]:
    """Content of a JSON output of a stage.

    Raises:
        MissingInputError: The stage has not succeeded, or its output is gone.
    """
    uri = require_result(run_dir, stage).outputs[output]
    content: dict[str, Any] | None = read_json(uri)
    if content is None:
        raise MissingInputError(f"file {uri}", expected="JSON", got="nothing", remedy=f"run `urm {stage}` again")
    return content


def find_equal(run_dir: str, stage: str, work_fingerprint: str, index: str) -> list[StageResult]:
    """Results of equal work, of this run and of another one, whether or not their outputs are still there."""
    places = (join(run_dir, stage, "result.json"), join(index, stage, f"{work_fingerprint}.json"))
    found = [read_earlier(uri) for uri in places]
    return [done for done in found if done is not None and done.fingerprint == work_fingerprint]


def find_others(run_dir: str, result: StageResult) -> list[StageResult]:
    """Results of a stage in the index beside a run, by the same configuration's name, newest first."""
    index = join(index_of_runs(absolute(run_dir)), result.stage)
    store, folder = open_store(index)
    with store_errors(index):
        paths = store.glob(f"{folder}/*.json")
    found = [read_earlier(join(index, path.rsplit("/", 1)[-1])) for path in paths]
    others = [done for done in found if done is not None and done.config == result.config]
    return sorted(others, key=lambda done: done.finished_at, reverse=True)


def is_whole(result: StageResult) -> bool:
    """Whether its outputs are still there."""
    return all(map(exists, result.outputs.values()))


def read_earlier(uri: str) -> StageResult | None:
    """An earlier result of the stage that is about to run; a damaged one is ignored, with a warning."""
    try:
        return _load(uri)
    except DataError as error:
        log.warning("earlier result is damaged, not used", error=str(error))
        return None


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
