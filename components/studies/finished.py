"""A finished run for studies: its model, its users and the names of its items."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers.utils.logging import disable_progress_bar

from components.addresses import absolute, fetch
from components.device import choose_device
from components.exceptions import DataError
from components.features.store import open_feature_store, read_history
from components.settings import Settings
from components.storage import require_result
from components.urm.data.request import UserContext
from components.urm.inference import UrmRecaller

SHOWN_USERS = 5  # user ids suggested when a user is unknown


def load_recaller(path: Callable[[str], Path], settings: Settings) -> UrmRecaller:
    """The model that an sft stage left; `path` gives the local path of an output of sft by its name."""
    hide_progress_bars()
    return UrmRecaller.load(path("model"), path("item_table"), path("candidates"), device=choose_device(settings))


def hide_progress_bars() -> None:
    """Keep transformers from drawing bars between the lines of a report."""
    disable_progress_bar()  # type: ignore[no-untyped-call]  # no annotation


class FinishedRun:
    """Outputs of a run directory, fetched where they are remote."""

    def __init__(self, run_dir: str, settings: Settings) -> None:
        """Take the run's folder or URI; nothing is read yet."""
        self.run_dir = absolute(run_dir)
        self.settings = settings

    def path(self, stage: str, output: str) -> Path:
        """Local path of a stage's output.

        Raises:
            MissingInputError: The stage has not succeeded in this run.
        """
        return fetch(require_result(self.run_dir, stage).outputs[output], self.settings.cache_path / "inputs")

    def recaller(self) -> UrmRecaller:
        """The trained model with its item table and candidates."""
        return load_recaller(lambda output: self.path("sft", output), self.settings)

    def newest_context(self, user_id: str) -> UserContext:
        """The context of a user one microsecond after the newest event, from the online feature store.

        Raises:
            DataError: The store does not know the user.
        """
        store = open_feature_store(self.path("features", "feature_store"), self.settings)
        history = read_history(store, [user_id], datetime.now(UTC))[0]
        if not history.num_events:
            raise DataError(
                f"user {user_id!r}",
                expected=f"a user with events, e.g. {', '.join(self._some_users())}",
                got="no such user in the feature store",
                remedy="check the id",
            )
        # Ages count to the newest event, as everywhere in the system, not to the clock of this machine.
        days_since = np.asarray(history.history_days_since, dtype=np.float64) - history.days_since_last
        return UserContext(
            item_ids=np.asarray(history.history_item_ids, dtype=np.int64),
            counts=np.asarray(history.history_counts, dtype=np.int32),
            days_since=days_since.astype(np.float32),
            behaviors=history.history_behaviors,
            num_events=history.num_events,
            num_items=history.num_items,
            num_active_days=history.num_active_days,
            days_since_last=0.0,
            top_categories=tuple(history.top_categories),
        )

    def describe_items(self, item_ids: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Title and category path of items, by id; an unknown item gets its number as title."""
        wanted = pc.field("item_id").isin(pa.array(list(item_ids), pa.int64()))
        rows = pq.read_table(
            self.path("validate", "items"), columns=["item_id", "title", "category"], filters=wanted
        ).to_pylist()
        known = {row["item_id"]: (row["title"], " > ".join(row["category"])) for row in rows}
        return {int(item): known.get(int(item), (f"item {item}", "")) for item in item_ids}

    def _some_users(self) -> list[str]:
        users = pq.read_table(self.path("features", "contexts"), columns=["user_id"])["user_id"]
        return [str(user) for user in pc.unique(users).to_pylist()[:SHOWN_USERS]]
