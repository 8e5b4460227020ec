"""Training and validation examples of the features stage, by context."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from components.config import Task
from components.exceptions import DataError
from components.urm.data.request import Ids, RecallRequest, UserContext, read_contexts


@dataclass(frozen=True, eq=False)
class Example:
    """A request with its targets."""

    request: RecallRequest
    targets: Ids  # item ids, at least one
    categories: tuple[str, ...]  # categories of the targets in words


Groups = list[tuple[UserContext, list[Example]]]


def read_examples(
    contexts: pa.Table, examples: pa.Table, tasks: dict[str, Task], split: str
) -> list[tuple[UserContext, list[Example]]]:
    """Examples of a split, grouped by the context they share, in the order of the tables.

    Raises:
        DataError: The split has no example, or an example names a task the run does not have.
    """
    known = read_contexts(contexts)
    groups: dict[int, list[Example]] = {}
    for row in examples.filter(pa.compute.equal(examples["split"], split)).to_pylist():
        if row["task"] not in tasks:
            raise DataError(
                f"example {row['example_id']}",
                expected=f"a task of the run ({', '.join(tasks)})",
                got=repr(row["task"]),
                remedy="run `urm features` again with this configuration",
            )
        request = RecallRequest(known[row["context_id"]], tasks[row["task"]], row["query"])
        targets = np.asarray(row["target_item_ids"], dtype=np.int64)
        groups.setdefault(row["context_id"], []).append(Example(request, targets, tuple(row["target_categories"])))
    if not groups:
        raise DataError(
            f"split {split!r}", expected="at least one example", got="none", remedy="widen the split's dates"
        )
    return [(known[context_id], group) for context_id, group in groups.items()]
