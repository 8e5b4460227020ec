"""Toy stages."""

from collections.abc import Callable

from components.storage import StageReport, StageResult, StageRun
from tests.worlds import CONFIGS

CONFIG = CONFIGS / "complete_journey.yaml"
Run = Callable[..., StageResult]


class Work:
    """A stage function that counts its calls and writes what it was told to."""

    def __init__(self, content: str = "rows") -> None:
        self.content = content
        self.runs: list[StageRun] = []

    def __call__(self, stage: StageRun) -> StageReport:
        self.runs.append(stage)
        (stage.output / "events").mkdir()
        (stage.output / "events" / "part.txt").write_text(self.content)
        (stage.output / "items.txt").write_text(self.content)
        outputs = {"events": "events", "items": "items.txt"}
        return StageReport(outputs=outputs, counts={"events": 3}, metrics={"share": 0.5})
