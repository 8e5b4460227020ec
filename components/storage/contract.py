"""What a stage function is given and what it returns."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict

from components import __version__
from components.addresses import fetch, join, write_json
from components.config import RunConfig
from components.exceptions import MissingInputError, UnavailableError
from components.flow import StageSpec
from components.settings import Settings

log = structlog.get_logger()


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
    made_with: str = ""  # digest of the settings that the stage reads; older results do not say
    reused_from: str | None = None  # URI of the result.json whose work this run uses


@dataclass
class StageReport:
    """What a stage function returns: paths relative to its output folder, counts and metrics.

    `announce` tells other systems of the outputs. It is called once these are in their place, so that nobody is sent to
    what is not there yet, and gives metrics more.
    """

    outputs: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    announce: Callable[[], dict[str, Any]] | None = None


@dataclass
class StageRun:
    """What a stage function is given."""

    spec: StageSpec
    config: RunConfig  # what the run is
    settings: Settings  # where it runs
    run_dir: str  # URI of the run directory
    folder: str  # URI that the output folder will have
    output: Path  # empty local folder to write to
    scratch: Path  # local folder that survives a killed attempt (checkpoints); gone after success
    inputs: dict[str, StageResult]  # results of the stages it reads
    previous: StageResult | None  # last result of this stage by this configuration's name and source, of any run
    options: dict[str, Any] = field(default_factory=dict)  # flags of this call that are no part of the configuration
    checkpoints: str = ""  # URI of a folder that outlives this machine, where the scratch folder does not
    is_current: Callable[[], bool] = lambda: True  # whether no other attempt has taken over

    @property
    def lasting(self) -> str:
        """URI of the folder that every later attempt finds again until one succeeds."""
        return self.checkpoints or str(self.scratch)

    def path(self, stage: str, name: str) -> Path:
        """Local path of an earlier stage's output, fetched first if it is remote.

        Raises:
            MissingInputError: The stage has no such output, or it is gone.
        """
        try:
            uri = self.inputs[stage].outputs[name]
        except KeyError:
            raise self._lacks(stage, f"output {name!r}") from None
        return fetch(uri, self.settings.cache_path / "inputs")

    def metric(self, stage: str, name: str) -> Any:
        """A metric of an earlier stage's result.

        Raises:
            MissingInputError: The result has none of this name, as one of older code.
        """
        try:
            return self.inputs[stage].metrics[name]
        except KeyError:
            raise self._lacks(stage, f"metric {name!r}") from None

    def _lacks(self, stage: str, what: str) -> MissingInputError:
        return MissingInputError(
            f"stage {self.spec.name}",
            expected=f"{what} of stage {stage!r}",
            got="none",
            remedy=f"run `urm {stage}` again",
        )

    def report_progress(self, message: str, **metrics: float) -> None:
        """Say what the stage is doing; shown in the log and by `urm demo`. Of several processes only the first does."""
        if self.settings.process > 0:
            return
        log.info(message, stage=self.spec.name, **metrics)
        content = {"message": message, "metrics": metrics, "at": time.time()}
        try:
            write_json(join(self.run_dir, self.spec.name, "progress.json"), content)
        except (OSError, UnavailableError) as error:  # hours of work do not end because nobody could be told of them
            log.warning("progress cannot be written", stage=self.spec.name, error=str(error))


StageFunction = Callable[[StageRun], StageReport]
