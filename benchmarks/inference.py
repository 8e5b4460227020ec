"""Speed of the recall inference: all tasks of a batch of users at once, against one request after another.

    fast    as a worker does it: user vectors of `recall.batch_size` users with all their tasks, then one exact top-K
    naive   the same model in float32, one request per pass, and a search in a faiss index of the same vectors for each

    python -m benchmarks.inference --config complete_journey --run-dir default --output inference.json

needs the stages features and release of the run. Both take turns in one process; what is reported is the median and
the range over the repeats. The share of the peak is all floating-point operations of the fast way (counted by torch;
padding and masked attention count as they are computed), by its time, against the fastest square matrix product.

Agreement is the share of the naive way's items that the fast one finds: of the whole (the backbone in bfloat16 where
the hardware has it), and of the top-K alone, given the same vectors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import faiss
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import Bench, Ids, alternate, describe, find_run, open_bench, parse_run, write_figures
from benchmarks.throughput import measure_peak
from components.device import has_bfloat16
from components.settings import get_settings
from components.urm.data.request import RecallRequest
from components.urm.inference import UrmRecaller
from components.urm.retrieval.exhaustive import recall_of
from components.urm.retrieval.users import UserVectors


class Clock:
    """Seconds of named parts, over all repeats."""

    def __init__(self) -> None:
        """Start at zero."""
        self.seconds: dict[str, float] = {}

    def lap(self, part: str, since: float) -> float:
        """Add the time since then to a part; returns now."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - since
        return now

    def shares(self) -> dict[str, float]:
        """Share of each part in the total."""
        total = sum(self.seconds.values())
        return {part: seconds / total for part, seconds in self.seconds.items()}


class NaiveSearch:
    """The catalogue in an index of faiss that compares every item."""

    def __init__(self, recaller: UrmRecaller) -> None:
        """Copy the candidates of a recaller that has an index."""
        self.candidates = frozenset(recaller.candidate_ids.tolist())
        self.index = faiss.IndexIDMap2(faiss.IndexFlatIP(recaller.dimension))
        assert recaller.index is not None  # load_recaller gives it one
        self.index.add_with_ids(recaller.index.vectors_of(recaller.candidate_ids), recaller.candidate_ids)

    def search(self, user: UserVectors, k: int, banned: Ids) -> Ids:
        """Best items of one request: H searches, their union, each item's best score, copied items one by one."""
        vectors, copied = user.vectors[0], user.copy_items[0]
        scores, items = self.index.search(vectors, min(k + len(banned) + len(copied), self.index.ntotal))
        best: dict[int, float] = {}
        for item, score in zip(items.ravel().tolist(), scores.ravel().tolist(), strict=True):
            best[item] = max(score, best.get(item, score))
        for item, raised in zip(copied.tolist(), user.copy_scores[0].tolist(), strict=True):
            if item in self.candidates:
                best[item] = float((vectors @ self.index.reconstruct(item)).max()) + raised
        for item in banned.tolist():
            best.pop(item, None)
        return np.array(sorted(best, key=lambda item: (-best[item], item))[:k], dtype=np.int64)


def run_fast(bench: Bench, clock: Clock) -> list[Ids]:
    """Items of every request, users in batches."""
    found: list[Ids] = []
    size = bench.config.recall.batch_size
    for start in range(0, len(bench.users), size):
        requests = [request for user in bench.users[start : start + size] for request in user]
        banned = [request.excluded_items for request in requests]
        now = time.perf_counter()
        vectors = bench.recaller.encode_users(requests)
        now = clock.lap("encode", now)
        found += bench.recaller.top_k(vectors, bench.config.recall.k, banned)[0]
        clock.lap("top_k", now)
    return found


def run_naive(bench: Bench, naive: NaiveSearch, users: Sequence[Sequence[RecallRequest]], clock: Clock) -> list[Ids]:
    """Items of every request, one after the other."""
    found: list[Ids] = []
    with mock.patch("components.device.has_bfloat16", return_value=False):  # there is no setting to turn it off
        for request in (request for requests in users for request in requests):
            now = time.perf_counter()
            user = bench.recaller.encode_users([request])
            now = clock.lap("encode", now)
            found.append(naive.search(user, bench.config.recall.k, request.excluded_items))
            clock.lap("top_k", now)
    return found


def measure(bench: Bench, repeats: int, num_naive: int) -> dict[str, Any]:
    """Both speeds, their ratio, agreement, and the share of the peak."""
    few, search = bench.users[:num_naive], NaiveSearch(bench.recaller)
    clocks = {"fast": Clock(), "naive": Clock()}
    run_naive(bench, search, few[:1], Clock())  # warm
    with FlopCounterMode(display=False) as counter:
        fast_items = run_fast(bench, Clock())
    naive_items = run_naive(bench, search, few, Clock())
    fast, naive = alternate(
        repeats,
        lambda: len(bench.users) / _seconds(lambda: run_fast(bench, clocks["fast"])),
        lambda: len(few) / _seconds(lambda: run_naive(bench, search, few, clocks["naive"])),
    )
    peaks = _peaks(str(next(bench.recaller.model.parameters()).device))
    flops = counter.get_total_flops() / len(bench.users) * describe(fast)["median"]
    return {
        "users": len(bench.users),
        "naive_users": len(few),
        "tasks": len(bench.config.tasks),
        "candidates": bench.recaller.num_candidates,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "users_per_second": describe(fast),
        "naive_users_per_second": describe(naive),
        "speed_up": describe([one / other for one, other in zip(fast, naive, strict=True)]),
        "shares_of_time": {name: clock.shares() for name, clock in clocks.items()},
        "agreement": recall_of(fast_items[: len(naive_items)], naive_items),
        "agreement_of_top_k": agreement_of_top_k(bench, search, few),
        "gflop_a_user": counter.get_total_flops() / len(bench.users) / 1e9,
        "used_gflops": flops / 1e9,
        "peak_gflops": {name: value / 1e9 for name, value in peaks.items()},
        "share_of_peak": flops / max(peaks.values()),
    }


def agreement_of_top_k(bench: Bench, naive: NaiveSearch, users: Sequence[Sequence[RecallRequest]]) -> float:
    """Recall of the faiss search's items by the fast top-K of a whole batch, both given the same vectors."""
    requests = [request for user in bench.users for request in user]
    asked, k = bench.recaller.encode_users(requests), bench.config.recall.k
    banned = [request.excluded_items for request in requests]
    found = bench.recaller.top_k(asked, k, banned)[0]
    some = range(sum(len(user) for user in users))
    wanted = [naive.search(asked.select([row]), k, banned[row]) for row in some]
    return recall_of([found[row] for row in some], wanted)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peaks(device: str) -> dict[str, float]:
    dtypes = (torch.float32, torch.bfloat16) if has_bfloat16(device) else (torch.float32,)
    return {str(dtype).removeprefix("torch."): measure_peak(dtype, device) for dtype in dtypes}


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = parse_run(__doc__)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--naive-users", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    settings = get_settings()
    config, run = find_run(arguments, settings)
    bench = open_bench(config, run, settings, arguments.users)
    figures = measure(bench, arguments.repeats, arguments.naive_users)
    print(json.dumps(figures, indent=2))
    write_figures(arguments.output, figures)


if __name__ == "__main__":
    main()
