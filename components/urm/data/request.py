"""A request: a user context at one point in time, a task, and for some tasks a query."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.config import Task
from components.exceptions import DataError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class UserContext:
    """Behaviour of a user strictly before one point in time.

    The four history fields are parallel, one entry per distinct item, newest first. Requests that share one
    *object* share one pass over it.
    """

    item_ids: Ids  # item ids of the history [n]
    counts: npt.NDArray[np.integer]  # events of each item [n]
    days_since: Floats  # days from each item's last event to that time [n]
    behaviors: Sequence[str]  # behaviour of each item's last event [n]
    num_events: int  # number of all events, also of items no longer in the history
    num_items: int  # number of all distinct items
    num_active_days: int  # number of days with an event
    days_since_last: float  # days from the last event to that time
    # the most frequent categories in words, most frequent first
    top_categories: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        lengths = {len(self.item_ids), len(self.counts), len(self.days_since), len(self.behaviors)}
        if len(lengths) > 1:
            raise DataError(
                "history of a user",
                expected="item_ids, counts, days_since and behaviors of one length",
                got=f"lengths {sorted(lengths)}",
                remedy="build the four lists from the same rows",
            )


@dataclass(frozen=True, eq=False)
class RecallRequest:
    """One task for one user context.

    Raises:
        DataError: The task needs a query and there is none, or the guidance is empty.
    """

    context: UserContext
    task: Task  # a task of the run
    query: str | None = None  # what the user searches for in words, for tasks that need it
    guidance: str | None = None  # what the recall should prefer in words, e.g. "For a barbecue."; for any task

    def __post_init__(self) -> None:
        if self.task.needs_query and not self.query:
            raise DataError(
                f"task {self.task.name!r}",
                expected="a query text",
                got=repr(self.query),
                remedy="pass the words that the user searched for",
            )
        if self.guidance is not None and not self.guidance.strip():
            raise DataError("guidance", expected="a text", got="none", remedy="describe in a few words what to recall")

    @property
    def excluded_items(self) -> Ids:
        """Items that may not be recalled: with `exclude_bought`, the user's own history."""
        return self.context.item_ids if self.task.exclude_bought else np.empty(0, dtype=np.int64)


def read_context(contexts: pa.Table, row: int) -> UserContext:
    """The user context of a row of a table of schema CONTEXTS; its arrays are views of the table's memory."""
    lists = {
        name: contexts[f"history_{name}"][row].values for name in ("item_ids", "counts", "days_since", "behaviors")
    }
    plain = ("num_events", "num_items", "num_active_days", "days_since_last")
    return UserContext(
        **{name: values.to_numpy(zero_copy_only=False) for name, values in lists.items()},
        **{name: contexts[name][row].as_py() for name in plain},
        top_categories=tuple(contexts["top_categories"][row].as_py()),
    )


def read_contexts(contexts: pa.Table) -> dict[int, UserContext]:
    """User contexts by context_id, from a table of schema CONTEXTS."""
    return {key: read_context(contexts, row) for row, key in enumerate(contexts["context_id"].to_pylist())}
