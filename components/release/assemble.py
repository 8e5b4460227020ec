"""Build the bundle's files out of what earlier stages left; large files are hard-linked where possible."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_IROTH

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from components.addresses import link_file
from components.config import RunConfig
from components.release.bundle import TITLES, IndexNote, SmokeRequest, write_smoke, write_tasks
from components.release.index import refuse, write_index
from components.urm.inference import UrmRecaller


@dataclass(frozen=True)
class BundleSources:
    """What a bundle is made of."""

    model: Path  # folder of URM
    item_table: Path  # folder of the table it reads
    candidates: Path  # folder of the catalogue's keys and vectors
    items: Path  # accepted items
    popularity: Path  # popular items per task
    predictions: Path  # URM's lists of the test examples
    examples: Path
    contexts: Path


def assemble(
    sources: BundleSources, config: RunConfig, device: str, bundle: Path, report: Callable[..., None]
) -> tuple[dict[str, int], IndexNote]:
    """Write every file of the bundle but the manifest; `device` is where an approximate index is measured.

    Returns:
        Counts (catalogue items, titles, smoke requests), and what the index is.

    Raises:
        ReleaseError: What an earlier stage left does not fit together.
    """
    link_tree(sources.model, bundle / "model")
    link_tree(sources.item_table, bundle / "item_table")
    write_tasks(bundle, config.tasks)
    num_titles = write_titles(sources.items, bundle / "titles.parquet")
    link_file(sources.popularity, bundle / "fallback.parquet")
    requests = choose_smoke_requests(
        predictions=pq.read_table(sources.predictions),
        examples=pq.read_table(sources.examples),
        contexts=sources.contexts,
        num_users=config.release.smoke_users,
    )
    write_smoke(bundle, requests)
    load = partial(UrmRecaller.load, sources.model, sources.item_table, device=device)
    note = write_index(sources.candidates, requests, load, config, bundle / "index.faiss", report)
    return {"candidates": note.items, "titles": num_titles, "smoke_requests": len(requests)}, note


def link_tree(source: Path, target: Path) -> None:
    """Give every file of a folder a second name, or copy it where the file system cannot; workers may read it."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link_file(path, linked := target / path.relative_to(source))
            if not linked.stat().st_mode & S_IROTH:  # safetensors writes for its owner alone; pods run as another user
                linked.chmod(0o644)


def write_titles(items: Path, target: Path) -> int:
    """What serving shows and filters by of every accepted item, sorted by item_id."""
    table = ds.dataset(items).to_table(columns=TITLES.names).sort_by("item_id").cast(TITLES)
    pq.write_table(table, target)
    return int(table.num_rows)


def choose_smoke_requests(
    predictions: pa.Table, examples: pa.Table, contexts: Path, num_users: int
) -> list[SmokeRequest]:
    """Requests of some of evaluation's users, spread over all of them, with the items that evaluation saw.

    Raises:
        ReleaseError: Evaluation predicted nothing for the examples given.
    """
    asked = examples.filter(pc.is_in(examples["example_id"], predictions["example_id"]))
    users = pc.unique(asked["context_id"]).sort()
    if not len(users):
        raise refuse("predictions of evaluate", "predictions for the test examples", "none")
    picked = users.take(np.linspace(0, len(users) - 1, min(num_users, len(users))).astype(np.int64))
    asked = asked.filter(pc.is_in(asked["context_id"], picked)).sort_by("example_id")
    seen = predictions.filter(pc.is_in(predictions["example_id"], asked["example_id"]))
    items = dict(zip(seen["example_id"].to_pylist(), seen["item_ids"].to_pylist(), strict=True))
    rows = ds.dataset(contexts).to_table(filter=ds.field("context_id").isin(picked)).to_pylist()
    by_id = {row["context_id"]: {**row, "cut_ts": row["cut_ts"].isoformat()} for row in rows}
    return [
        SmokeRequest(
            context=by_id[row["context_id"]], task=row["task"], query=row["query"], item_ids=items[row["example_id"]]
        )
        for row in asked.to_pylist()
    ]
