"""A release as a worker serves it: bundle verified, model loaded, smoke check passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import structlog

from components.config import ItemFilter, ReleaseConfig, Task
from components.device import choose_device
from components.exceptions import ReleaseError, UserError
from components.features.feast import FeatureStore
from components.features.store import History, materialized_until, open_online_store, read_history
from components.recall.serving.context import HistoryItem, HistoryRule, KnownHistory
from components.recall.serving.fetching import FetchedRelease, fetch_release
from components.recall.serving.filters import blocked_items
from components.recall.state.events import to_microseconds
from components.release.bundle import SmokeRequest, read_smoke, read_tasks
from components.release.publication import Publication
from components.release.smoke import to_requests
from components.settings import Settings
from components.urm.data.request import Ids, RecallRequest
from components.urm.inference import UrmRecaller

log = structlog.get_logger()
_DAY_US = 86_400_000_000
_NO_ITEMS = np.empty(0, dtype=np.int64)

Ranking = tuple[list[int], list[float]]


@dataclass(frozen=True)
class ServingRelease:
    """Everything that results are computed with; replaced as a whole, never changed.

    Attributes:
        publication: The publication that asked for it.
        tasks: Tasks of the release.
        rule: How its features shape a history.
        recaller: Model, item table and index.
        features: The Feast store with what is known of users.
        blocked: Candidates that a task may not recall, by its name.
        created_at: When the release was made, seconds since 1970.
        features_until: Up to when its features know events, seconds since 1970.
    """

    publication: Publication
    tasks: tuple[Task, ...]
    rule: HistoryRule
    recaller: UrmRecaller
    features: FeatureStore
    blocked: Mapping[str, Ids] = field(default_factory=dict)
    created_at: float = 0.0
    features_until: float = 0.0

    @property
    def name(self) -> str:
        """Name of the release."""
        return self.publication.release

    @property
    def order(self) -> int:
        """Number of its publication."""
        return self.publication.order

    @property
    def num_tokens(self) -> int:
        """Prompt tokens encoded so far."""
        return self.recaller.num_tokens

    def same_bundle(self, other: Publication) -> bool:
        """Whether another publication asks for this very bundle, by a manifest that is verified already."""
        known = (self.publication.release, self.publication.bundle)
        return known == (other.release, other.bundle) and other.manifest in ("", self.publication.manifest)

    def republished(self, publication: Publication) -> ServingRelease:
        """The same release under a new publication."""
        return replace(self, publication=publication)

    def recommend(self, requests: Sequence[RecallRequest], k: int) -> list[Ranking]:
        """Items and scores of each request, best first.

        Raises:
            ReleaseError: The model gives vectors that are not finite.
        """
        if not requests:
            return []
        users = self.recaller.encode_users(requests)
        finite = users.finite
        if not finite.all():
            raise ReleaseError(
                f"release {self.name}",
                expected="finite user vectors",
                got=f"{int((~finite).sum())} of {len(requests)} requests without",
                remedy="train again, or roll back with `urm rollback`",
            )
        rankings: list[Ranking] = [([], [])] * len(requests)
        for blocked, numbers in self._group_by_blocked(requests):
            exclude = [requests[number].excluded_items for number in numbers]
            items, scores = self.recaller.top_k(users.select(numbers), k, exclude, blocked)
            for number, ids, row in zip(numbers, items, scores, strict=True):
                rankings[number] = ids.tolist(), row.tolist()
        return rankings

    def _group_by_blocked(self, requests: Sequence[RecallRequest]) -> list[tuple[Ids, list[int]]]:
        """Requests whose tasks block the same items: tasks of equal filters share one array."""
        groups: dict[int, tuple[Ids, list[int]]] = {}
        for number, request in enumerate(requests):
            blocked = self.blocked.get(request.task.name, _NO_ITEMS)
            groups.setdefault(id(blocked), (blocked, []))[1].append(number)
        return list(groups.values())

    def count_unknown(self, item_ids: Sequence[int]) -> int:
        """How many items the item table does not have; the model leaves them out of a history."""
        if not item_ids:
            return 0
        return int((self.recaller.builder.reader.table.rows(np.asarray(item_ids, dtype=np.int64)) < 0).sum())

    def read_histories(self, user_ids: list[str]) -> dict[str, KnownHistory]:
        """What the online feature store knows of each user."""
        now = datetime.now(UTC)
        histories = read_history(self.features, user_ids, now)
        now_us = to_microseconds(now)
        return {user_id: _known(history, now_us) for user_id, history in zip(user_ids, histories, strict=True)}


def load_release(
    publication: Publication,
    settings: Settings,
    config: ReleaseConfig,
    filters: Mapping[str, ItemFilter] | None = None,
) -> ServingRelease:
    """Fetch, verify and load a published release, and run its smoke check, before anything is filtered.

    Args:
        publication: Which.
        settings: Where.
        config: Of the smoke check.
        filters: What its tasks leave out beside unavailable items.

    Raises:
        ReleaseError: A file is missing, altered or extra, the bundle is another release's, a check failed, or the
            online store knows none of its users.
        UrmError: The bundle or the feature store cannot be reached or does not fit together.
    """
    fetched = fetch_release(publication, settings)
    release = _open(publication, fetched, settings)
    smoke = read_smoke(fetched.bundle)
    check(release, smoke, config.smoke_min_overlap)
    check_features(release, smoke)
    return replace(release, blocked=_blocked(release, fetched.bundle, filters or {}))


def check(release: ServingRelease, smoke: list[SmokeRequest], min_overlap: float) -> float:
    """Run the smoke requests and compare with what evaluation saw; warms the model up as well.

    Returns:
        Mean share of evaluation's items that come back.

    Raises:
        ReleaseError: A score is not finite, or the share is too small.
    """
    requests = to_requests(smoke, release.tasks)
    k = max((len(row.item_ids) for row in smoke), default=0)
    overlaps = [
        len(set(items[: len(row.item_ids)]) & set(row.item_ids)) / len(row.item_ids)
        for row, (items, _) in zip(smoke, release.recommend(requests, k), strict=True)
        if row.item_ids
    ]
    overlap = float(np.mean(overlaps)) if overlaps else 0.0
    if overlap < min_overlap:
        raise ReleaseError(
            f"smoke check of release {release.name}",
            expected=f"a share of at least {min_overlap:g} of the items that evaluation saw",
            got=f"{overlap:.3f} over {len(overlaps)} requests",
            remedy="find out what differs between evaluation and the bundle",
        )
    log.info("smoke check passed", release=release.name, overlap=round(overlap, 4), requests=len(overlaps))
    return overlap


def check_features(release: ServingRelease, smoke: Sequence[SmokeRequest]) -> None:
    """See that the online store still holds what the release knows of users; else each would be served as a new one.

    Raises:
        ReleaseError: It has a history of none of the smoke requests' users.
    """
    known = sorted({str(row.context["user_id"]) for row in smoke if row.context["history_item_ids"]})
    if known and not any(history.num_events for history in release.read_histories(known).values()):
        raise ReleaseError(
            f"online features of release {release.name}",
            expected=f"a history of at least one of {len(known)} users whom it knows, e.g. {known[0]!r}",
            got="none: another store, or they were removed",
            remedy="correct its address, or compute them again with `urm features --force` and release anew",
        )


def _open(publication: Publication, fetched: FetchedRelease, settings: Settings) -> ServingRelease:
    bundle, manifest = fetched.bundle, fetched.manifest
    try:
        recaller = UrmRecaller.load(
            bundle / "model", bundle / "item_table", bundle / "index.faiss", device=choose_device(settings)
        )
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise on files that do not fit is one thing: a bad bundle
        raise ReleaseError(
            f"bundle {bundle}", expected="a model that loads", got=error, remedy="build the release again"
        ) from error
    features = open_online_store(fetched.features, settings)
    rule = HistoryRule(length=manifest.history_length, day_origin_us=to_microseconds(manifest.day_origin))
    return ServingRelease(
        publication,
        read_tasks(bundle),
        rule,
        recaller,
        features,
        created_at=manifest.created_at.timestamp(),
        features_until=materialized_until(features),
    )


def _blocked(release: ServingRelease, bundle: Path, filters: Mapping[str, ItemFilter]) -> dict[str, Ids]:
    """Of each task's forbidden items those that are candidates at all."""
    titles = pq.read_table(bundle / "titles.parquet", partitioning=None)
    candidates = release.recaller.candidate_ids
    by_task = blocked_items(titles, [task.name for task in release.tasks], filters)
    kept = {id(items): items[np.isin(items, candidates)] for items in by_task.values()}  # still one of equal ones
    return {task: kept[id(items)] for task, items in by_task.items()}


def _known(history: History, now_us: int) -> KnownHistory:
    """The feature store's answer, with ages turned back into instants."""
    if not history.num_events:
        return KnownHistory()
    rows = zip(
        history.history_item_ids,
        history.history_counts,
        history.history_days_since,
        history.history_behaviors,
        strict=True,
    )
    return KnownHistory(
        as_of_us=now_us - round(history.days_since_last * _DAY_US) + 1,
        items={
            item_id: HistoryItem(count, now_us - round(days * _DAY_US), behavior)
            for item_id, count, days, behavior in rows
        },
        num_events=history.num_events,
        num_items=history.num_items,
        num_active_days=history.num_active_days,
        top_categories=tuple(history.top_categories),
    )
