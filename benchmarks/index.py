"""The candidate index by the size of the catalogue: cost of building, cost of a search, recall.

One line of JSON per size and kind. Catalogues beyond the run's own are mixtures of its items (see catalogues.py),
generated block by block, so that none is ever in memory as a whole; queries are the user vectors of the run's model for
test users. Truth comes from brute force over the same blocks and is kept. Each step runs in its own process, to measure
its peak memory. Lines that the output has are not measured again: a stopped run resumes.

    python -m benchmarks.index --config complete_journey --run-dir default --work indexes --output index.jsonl \
        --sizes 0 100000 1000000 10000000

Size 0 is the run's own catalogue. Needs the stages features and sft of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.bench import find_run, parse_run
from benchmarks.catalogues import Catalogue
from benchmarks.lines import append_line, read_lines
from components.caches import write_whole
from components.config import RunConfig
from components.device import set_threads
from components.items.ramps import num_ramps
from components.settings import get_settings
from components.storage import require_result
from components.studies.finished import FinishedRun
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller
from components.urm.retrieval.exact import ExactIndex
from components.urm.retrieval.exhaustive import recall_of, top_of_all
from components.urm.retrieval.faiss_kinds import KINDS, build_approximate, choose_kind, save_index
from components.urm.retrieval.index import read_candidates, search
from components.urm.retrieval.users import UserVectors

K = 100
WARM_UP, REPEATS = 1, 5
EXACT_LIMIT_BYTES = 8 << 30  # almost three copies in memory while it is built


@dataclass(frozen=True)
class Queries:
    """Requests of test users.

    Attributes:
        asked: Their user vectors, the tasks of a user consecutive.
        exclude: Excluded items of each request.
        users: Number of users.
    """

    asked: UserVectors
    exclude: list[np.ndarray]
    users: int

    def of_users(self, first: int, last: int) -> Queries:
        """Those of some users."""
        per_user = len(self.asked) // self.users
        part = range(first * per_user, last * per_user)
        return Queries(self.asked.select(part), [self.exclude[row] for row in part], last - first)

    def save(self, path: Path) -> None:
        """Write them to a file."""
        arrays = (
            _flat("copy_items", self.asked.copy_items)
            | _flat("copy_scores", self.asked.copy_scores)
            | _flat("exclude", self.exclude)
        )
        with write_whole(path) as temporary:
            with temporary.open("wb") as file:
                np.savez(file, vectors=self.asked.vectors, users=self.users, **arrays)
            temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Queries:
        """Read them again."""
        with np.load(path) as file:
            asked = UserVectors(file["vectors"], _ragged(file, "copy_items"), _ragged(file, "copy_scores"))
            return cls(asked, _ragged(file, "exclude"), int(file["users"]))


def _flat(name: str, rows: Sequence[np.ndarray]) -> dict[str, Any]:
    return {name: np.concatenate(rows), f"{name}_ends": np.cumsum([len(row) for row in rows])}


def _ragged(file: Any, name: str) -> list[np.ndarray]:
    return np.split(file[name], file[f"{name}_ends"][:-1])


def draw_queries(run: FinishedRun, config: RunConfig, num_users: int) -> Queries:
    """User vectors of test users for every task; a task with a query asks for the user's first category."""
    contexts = read_contexts(pq.read_table(run.path("features", "contexts"), filters=pc.field("split") == "test"))
    usable = [context for context in contexts.values() if context.top_categories]
    chosen = np.random.default_rng(config.seed).choice(len(usable), num_users, replace=False)
    requests = [
        RecallRequest(usable[place], task, usable[place].top_categories[0] if task.needs_query else None)
        for place in chosen
        for task in config.tasks
    ]
    recaller = UrmRecaller.load(run.path("sft", "model"), run.path("sft", "item_table"))
    return Queries(
        recaller.encode_users(requests),
        [request.excluded_items for request in requests],
        num_users,
    )


class Bench:
    """A run's catalogue at one size, and its queries."""

    def __init__(self, arguments: argparse.Namespace, size: int) -> None:
        """Take the run; nothing large is read yet."""
        settings = get_settings()
        set_threads(settings)
        self.config, self.run = find_run(arguments, settings)
        self.num_users, self.seed, self.work = arguments.users, self.config.seed, arguments.work
        self.model = f"{require_result(self.run.run_dir, 'sft').fingerprint[:16]}-{self.seed}"
        candidates = self.run.path("sft", "candidates")
        keys = np.load(candidates / "keys.npy")
        description = json.loads((self.run.path("sft", "model") / "urm.json").read_text())
        self.catalogue = Catalogue(
            keys=keys,
            vectors=np.load(candidates / "vectors.npy", mmap_mode="r"),
            popularity=num_ramps(description["num_counts"], description.get("ramps", 1)),
            size=size or len(keys),
            seed=self.seed,
        )

    def queries(self) -> Queries:
        """The same for every size and kind, kept in a file."""
        path = self.work / f"queries-{self.model}-{self.num_users}.npz"
        if not path.exists():
            draw_queries(self.run, self.config, self.num_users).save(path)
        return Queries.load(path)

    def index_path(self, kind: str) -> Path:
        """Where an index lies while it is measured."""
        return self.work / f"{kind}-{self.catalogue.size}.faiss"

    def truth(self) -> list[np.ndarray]:
        """The exact answers, kept in a file."""
        path = self.work / f"truth-{self.model}-{self.catalogue.size}-{self.num_users}.npy"
        if not path.exists():
            asked, catalogue = self.queries(), self.catalogue
            exact = top_of_all(catalogue.item_ids, catalogue.blocks(), asked.asked, K, "max", asked.exclude)
            with write_whole(path) as temporary:
                with temporary.open("wb") as file:
                    np.save(file, np.stack(exact))
                temporary.replace(path)
        return list(np.load(path))


def build(bench: Bench, kind: str) -> dict[str, Any]:
    """Build an index and write it."""
    catalogue, start = bench.catalogue, time.perf_counter()
    if kind == "exact":
        index = ExactIndex(catalogue.item_ids, np.concatenate(list(catalogue.blocks())))
    else:
        index = build_approximate(kind, catalogue.item_ids, catalogue.blocks, bench.seed, bench.work)
    built = time.perf_counter()
    path = bench.index_path(kind)
    save_index(index, path)
    written = time.perf_counter()
    for _ in catalogue.blocks():
        pass
    return {
        "build_seconds": built - start,
        "of_which_synthesis_seconds": (1 if kind == "exact" else 2) * (time.perf_counter() - written),
        "write_seconds": written - built,
        "index_bytes": path.stat().st_size,
    }


def measure_search(bench: Bench, kind: str) -> dict[str, Any]:
    """Milliseconds per user, one at a time and all together, and recall."""
    asked, truth = bench.queries(), bench.truth()
    index = read_candidates(bench.index_path(kind))

    def ask(part: Queries) -> list[np.ndarray]:
        return search(index, part.asked, K, "max", part.exclude)[0]

    single = [_clock(lambda part=part: ask(part)) for part in (asked.of_users(n, n + 1) for n in range(asked.users))]
    batched = _clock(lambda: ask(asked)) / asked.users
    return {
        "single_ms_a_user": 1000 * statistics.median(single),
        "batched_ms_a_user": 1000 * batched,
        "recall": recall_of(ask(asked), truth),
        "least_recall_of_a_request": min(recall_of([a], [b]) for a, b in zip(ask(asked), truth, strict=True)),
        "requests": len(truth),
    }


def _clock(work: Callable[[], object]) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def peak_gib() -> float:
    """Peak resident memory of this process, mapped files included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


STEPS: dict[str, Callable[[Bench, str], dict[str, Any]]] = {
    "truth": lambda bench, _: {"queries": len(bench.truth())},
    "build": build,
    "search": measure_search,
}


def run_step(arguments: Sequence[str], step: str, size: int, kind: str) -> dict[str, Any]:
    """One step in its own process."""
    command = [sys.executable, "-m", "benchmarks.index", *arguments, "--step", step, "--sizes", str(size)]
    done = subprocess.run([*command, "--kinds", kind], stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_all(arguments: argparse.Namespace, given: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Lines that the output lacks, as they come."""
    known = {(line["size"], line["kind"], line.get("model")) for line in read_lines(arguments.output)}
    for size in arguments.sizes:
        bench = Bench(arguments, size)
        size, width = bench.catalogue.size, bench.catalogue.vectors.shape[1]
        about = {"size": size, "width": width, "threads": faiss.omp_get_max_threads(), "chosen": choose_kind(size)}
        about |= {"model": bench.model}
        for kind in arguments.kinds:
            if (size, kind, bench.model) in known:
                continue
            if kind == "exact" and size * width * 4 > EXACT_LIMIT_BYTES:
                yield about | {"kind": kind, "not_built": f"{size * width * 4 / 2**30:.0f} GiB of vectors"}
                continue
            steps = {step: run_step(given, step, size, kind) for step in STEPS}
            bench.index_path(kind).unlink()
            yield about | {"kind": kind} | steps["build"] | steps["search"]


def main() -> None:
    """Measure what is missing; print and append each line."""
    parser = parse_run(__doc__)
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--work", type=Path, required=True, help="Folder for indexes and truth: 3 KB per item")
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.step:
        figures = STEPS[arguments.step](Bench(arguments, arguments.sizes[0]), arguments.kinds[0])
        print(json.dumps(figures | {f"{arguments.step}_peak_gib": peak_gib()}))
        return
    for line in measure_all(arguments, sys.argv[1:]):
        print(json.dumps(line), flush=True)
        append_line(arguments.output, line)


if __name__ == "__main__":
    main()
