"""Training and validation examples of the features stage, by context, read when they are asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.config import RunConfig, Task
from components.exceptions import DataError
from components.schemas.examples import map_rows
from components.urm.data.request import Ids, RecallRequest, UserContext, read_context

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_ROWS_PER_READ = 100_000


class TrainingOutputs(NamedTuple):
    """Names of the outputs of `features` and `encode` that a training reads."""

    examples: str
    item_table: str


TRAINING_OUTPUTS = {
    "recent": TrainingOutputs("recent_examples", "item_table_past"),
    "all": TrainingOutputs("examples", "item_table"),
}  # by `urm.train_cuts`


@dataclass(frozen=True, eq=False)
class Example:
    """A request with its targets."""

    request: RecallRequest
    targets: Ids  # item ids, at least one
    categories: tuple[str, ...]  # categories of the targets in words


Group = tuple[UserContext, list[Example]]


class Groups(Sequence[Group]):
    """Contexts with their examples, in the order in which the examples name the contexts.

    Held are the places of the rows alone. A group is made of its rows whenever it is asked for, so of memory-mapped
    tables (`map_rows`) only what is read comes into memory.
    """

    def __init__(self, contexts: pa.Table, examples: pa.Table, tasks: Mapping[str, Task], split: str) -> None:
        """Take tables of the schemas CONTEXTS and EXAMPLES; examples of other splits do not count.

        Raises:
            DataError: The split has no example, or an example names a context or a task that is not there.
        """
        self._contexts, self._examples, self._tasks = contexts, examples, tasks
        rows = np.flatnonzero(pc.equal(examples["split"], split).to_numpy())
        if not len(rows):
            raise DataError(
                f"split {split!r}", expected="at least one example", got="none", remedy="widen the split's dates"
            )
        context_rows = self._find("context_id", contexts["context_id"].combine_chunks(), "a known context", rows)
        self._find("task", pa.array(list(tasks)), f"a task of the run ({', '.join(tasks)})", rows)
        _, first, number = np.unique(context_rows, return_index=True, return_inverse=True)
        places = np.argsort(np.argsort(first))[number]  # of each example's group
        self._rows = rows[np.argsort(places, kind="stable")]  # of the examples, group after group
        self._offsets = np.concatenate([[0], np.cumsum(np.bincount(places))])
        self._context_rows = context_rows[np.sort(first)]

    def __len__(self) -> int:
        """Number of contexts."""
        return len(self._context_rows)

    @overload
    def __getitem__(self, place: SupportsIndex) -> Group: ...
    @overload
    def __getitem__(self, place: slice) -> list[Group]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> Group | list[Group]:
        """A context and its examples, which share it as one object."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        context = read_context(self._contexts, int(self._context_rows[number]))
        rows = self._rows[self._offsets[number] : self._offsets[number + 1]]
        return context, [self._read_example(context, row) for row in rows.tolist()]

    @property
    def num_examples(self) -> Ints:
        """Number of examples of each context [n]."""
        return np.diff(self._offsets)

    @property
    def history_lengths(self) -> Ints:
        """Number of items in the history of each context [n]."""
        lengths = pc.list_value_length(self._contexts["history_item_ids"]).to_numpy().astype(np.int64)
        of_groups: Ints = lengths[self._context_rows]
        return of_groups

    def count_tasks(self) -> dict[str, int]:
        """Number of examples of each task that occurs."""
        names = self._examples["task"].dictionary_encode().combine_chunks()
        counts = np.bincount(names.indices.to_numpy()[self._rows], minlength=len(names.dictionary))
        return {name: int(count) for name, count in zip(names.dictionary.to_pylist(), counts, strict=True) if count}

    def count_targets(self, item_ids: Ids) -> dict[str, Floats]:
        """How often each of these items is a target of each task [n]; the targets of an example count one together."""
        order = np.argsort(item_ids)
        counts = {name: np.zeros(len(item_ids)) for name in self.count_tasks()}
        rows = np.sort(self._rows)
        for start in range(0, len(rows), _ROWS_PER_READ):
            read = self._examples.select(["task", "target_item_ids"]).take(rows[start : start + _ROWS_PER_READ])
            targets = read["target_item_ids"].combine_chunks()
            lengths = np.diff(targets.offsets.to_numpy())
            flat, weights = targets.flatten().to_numpy(), np.repeat(1 / np.maximum(lengths, 1), lengths)
            places = order[np.minimum(np.searchsorted(item_ids, flat, sorter=order), len(order) - 1)]
            found = item_ids[places] == flat
            names = np.repeat(read["task"].to_numpy(), lengths)
            for name, of_task in counts.items():
                mine = found & (names == name)
                of_task += np.bincount(places[mine], weights=weights[mine], minlength=len(item_ids))
        return counts

    def behaviors(self) -> list[str]:
        """The distinct behaviours in the histories, sorted."""
        wanted = np.zeros(len(self._contexts), dtype=bool)
        wanted[self._context_rows] = True
        known: set[str] = set()
        first = 0
        for chunk in self._contexts["history_behaviors"].chunks:
            chosen = chunk.filter(pa.array(wanted[first : first + len(chunk)]))
            known.update(chosen.flatten().unique().to_pylist())
            first += len(chunk)
        return sorted(known)

    def _find(self, column: str, known: pa.Array, expected: str, rows: Ints) -> Ints:
        """Places of these rows' values among the known ones."""
        places: Ints = pc.fill_null(pc.index_in(self._examples[column], value_set=known), -1).to_numpy()[rows]
        if (places < 0).any():
            row = int(rows[np.argmax(places < 0)])
            raise DataError(
                f"example {self._examples['example_id'][row]}",
                expected=expected,
                got=repr(self._examples[column][row].as_py()),
                remedy="run `urm features` again with this configuration",
            )
        return places

    def _read_example(self, context: UserContext, row: int) -> Example:
        read: dict[str, Any] = {name: self._examples[name][row] for name in self._examples.column_names}
        request = RecallRequest(context, self._tasks[read["task"].as_py()], read["query"].as_py())
        return Example(request, read["target_item_ids"].values.to_numpy(), tuple(read["target_categories"].as_py()))


def read_groups(contexts: Path, examples: Path, config: RunConfig, split: str, folder: Path) -> Groups:
    """Examples of a split; of the training split, those of the cuts that URM trains on (`urm.train_cuts`).

    The files are tables of the schemas CONTEXTS and EXAMPLES; what is mapped lies in `folder` (`map_rows`).

    Raises:
        DataError: As `Groups`.
    """
    of_split = pc.field("split") == split
    of_cuts = of_split
    if split == "train" and config.urm.train_cuts == "recent":
        of_cuts &= pc.field("cut_ts") >= pc.scalar(config.features.split.recent_start)
    return Groups(
        map_rows(contexts, of_cuts, folder),
        map_rows(examples, of_split, folder),
        {task.name: task for task in config.tasks},
        split,
    )
