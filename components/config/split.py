"""Training, validation and test: cuts in time, or places in a sequence."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from components.config.model import Model

SPLITS = ("train", "validation", "test")

Split = Literal["train", "validation", "test"]

# Sequences have an order and no times: the newest event of every user falls on this day, the one before it on the day
# before, and so on. A split at the last two days is then leave-one-out.
SEQUENCE_LAST_DAY = datetime(2020, 1, 1, tzinfo=UTC)

MAX_TRAIN_CUTS = 50

RECENT_WINDOWS = 2  # what comes into fashion and goes out of it shows in these


class SplitConfig(Model):
    """A cut every `window_days`; targets are what follows within that window.

    `kind: leave_one_out` needs no dates, only sequences: each user's last event is a test target, the one before it a
    validation target, and each of the `max_train_cuts` before those, except the first, a training target. It is
    the same split with a window of one day, because of the days that sequences get.
    """

    kind: Literal["temporal", "leave_one_out"] = "temporal"
    max_train_cuts: int | None = Field(
        default=None, gt=0, description=f"leave_one_out: training targets per user, newest first ({MAX_TRAIN_CUTS})."
    )
    recent_cuts: int = Field(
        default=8,
        gt=0,
        description="Newest training cuts; URM trains on them, with ID vectors that know only what was before, unless "
        "`urm.train_cuts` is all.",
    )
    train_start: AwareDatetime = Field(description="First training cut.")
    validation_start: AwareDatetime = Field(description="First validation cut; the training window ends here.")
    test_start: AwareDatetime = Field(description="First test cut.")
    end: AwareDatetime = Field(description="No target lies at or after this instant.")
    window_days: int = Field(default=7, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, content: Any) -> Any:
        if not isinstance(content, dict) or content.get("kind") != "leave_one_out":
            return content
        written = {name: value for name, value in content.items() if value is not None}
        cuts = written.setdefault("max_train_cuts", MAX_TRAIN_CUTS)
        return _leave_one_out(cuts if isinstance(cuts, int) else MAX_TRAIN_CUTS) | written

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        bounds = [self.train_start, self.validation_start, self.test_start, self.end]
        if any(later - earlier < self.window for earlier, later in itertools.pairwise(bounds)):
            raise ValueError(
                "expected train_start < validation_start < test_start < end, each at least one window apart"
            )
        for earlier, later in itertools.pairwise(bounds):
            by_the_wall = later.replace(tzinfo=None) - earlier.replace(tzinfo=None)
            if by_the_wall % self.window == timedelta() != (later - earlier) % self.window:
                raise ValueError(
                    f"expected whole windows between {earlier.isoformat()} and {later.isoformat()}, whose offsets "
                    "differ by summer time; write all bounds with one offset"
                )
        return self

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.kind == "temporal":
            if self.max_train_cuts is not None:
                raise ValueError("expected max_train_cuts with kind leave_one_out only")
        elif any(getattr(self, name) != value for name, value in _leave_one_out(self.max_train_cuts or 1).items()):
            raise ValueError("expected no dates and no window_days with kind leave_one_out, which sets them")
        return self

    @property
    def window(self) -> timedelta:
        """Length of the target window."""
        return timedelta(days=self.window_days)

    @property
    def recent_start(self) -> datetime:
        """First of the newest training cuts, see `recent_cuts`."""
        train = [cut for cut, split in self.cuts() if split == "train"]
        return train[-self.recent_cuts :][0]

    def newest_windows(self, until: datetime, number: int = RECENT_WINDOWS) -> datetime | None:
        """When the newest windows before an instant begin.

        None under leave-one-out, whose windows are places in a sequence and no times.
        """
        return None if self.kind == "leave_one_out" else until - number * self.window

    def cuts(self) -> list[tuple[datetime, Split]]:
        """All (cut, split) pairs, oldest first; a window never crosses into the next split."""
        bounds = {
            "train": (self.train_start, self.validation_start),
            "validation": (self.validation_start, self.test_start),
            "test": (self.test_start, self.end),
        }
        pairs: list[tuple[datetime, Split]] = []
        for split in SPLITS:
            cut, end = bounds[split]
            while cut + self.window <= end:
                pairs.append((cut, split))  # type: ignore[arg-type]  # SPLITS is a tuple of str
                cut += self.window
        return pairs


def _leave_one_out(max_train_cuts: int) -> dict[str, Any]:
    """Fields of a temporal split that leaves out the last two events of every sequence."""
    day = timedelta(days=1)
    return {
        "train_start": SEQUENCE_LAST_DAY - (1 + max_train_cuts) * day,
        "validation_start": SEQUENCE_LAST_DAY - day,
        "test_start": SEQUENCE_LAST_DAY,
        "end": SEQUENCE_LAST_DAY + day,
        "window_days": 1,
    }
