"""Reads what the stages of a finished run left."""

from __future__ import annotations

from typing import Any

from components.addresses import read_json
from components.exceptions import MissingInputError
from components.storage import StageResult, load_result


def require_result(run_dir: str, stage: str) -> StageResult:
    """Result of a stage.

    Raises:
        MissingInputError: It has none.
    """
    result = load_result(run_dir, stage)
    if result is None:
        raise MissingInputError(
            f"run {run_dir}", expected=f"a result of stage {stage!r}", got="none", remedy=f"run `urm {stage}` again"
        )
    return result


def require_json(run_dir: str, stage: str, output: str) -> dict[str, Any]:
    """Content of a JSON output of a stage.

    Raises:
        MissingInputError: It is gone.
    """
    uri = require_result(run_dir, stage).outputs[output]
    content: dict[str, Any] | None = read_json(uri)
    if content is None:
        raise MissingInputError(f"file {uri}", expected="JSON", got="nothing", remedy=f"run `urm {stage}` again")
    return content
