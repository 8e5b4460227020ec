"""Prometheus metrics of the recall runtime; names carry their unit.

Every worker of a container has its own page. Counters and histograms are its own and are summed; the gauges of the
shared stream, of the dead letters and of Redis are what all workers of the stream see alike: aggregate them by max,
never by sum. Ad-hoc workers have no such gauges.
"""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, start_http_server
from prometheus_client.registry import Collector

from components.exceptions import UnavailableError

log = structlog.get_logger()
STALE_SECONDS = 60.0
Kind = Literal["stream", "ad_hoc"]
# From a cache hit to a backlog of minutes; the target is a p95 of five seconds.
_VISIBLE_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 15, 30, 60, 300)
_STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
# From a read, whose target is a p99 of 10 ms, to an ad-hoc request at the longest deadline.
_REQUEST_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)


class ReleaseGauge:
    """The release that a worker serves; each sample says what kind of worker it is."""

    def __init__(self, kind: Kind, registry: CollectorRegistry) -> None:
        self._kind = kind
        self._gauge = Gauge("urm_worker_release", "1: the release served.", ["kind", "release"], registry=registry)

    def labels(self, release: str) -> Gauge:
        """The gauge of one release."""
        return self._gauge.labels(kind=self._kind, release=release)


class WorkerMetrics:
    """What a worker of either kind counts, in its own registry."""

    def __init__(self, kind: Kind) -> None:
        self.registry = CollectorRegistry()
        self.stage_seconds = Histogram(
            "urm_worker_stage_seconds",
            "Time per part of a batch.",
            ["part"],
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self.release = ReleaseGauge(kind, self.registry)
        self.switches = Counter(
            "urm_worker_release_switches", "Releases by outcome.", ["outcome"], registry=self.registry
        )
        _start_at_zero(self.switches, "serving", "rejected")
        self.release_created = Gauge(
            "urm_worker_release_created_timestamp_seconds", "When the served release was made.", registry=self.registry
        )
        self.features_until = Gauge(
            "urm_worker_features_until_timestamp_seconds",
            "Instant up to which the served release's features know events.",
            registry=self.registry,
        )


class AdHocMetrics(WorkerMetrics):
    """What an ad-hoc worker counts."""

    def __init__(self) -> None:
        super().__init__("ad_hoc")
        self.requests = Counter(
            "urm_ad_hoc_requests", "Ad-hoc requests by outcome.", ["outcome"], registry=self.registry
        )


class StreamMetrics(WorkerMetrics):
    """What a worker of the stream counts, and what it sees of the stream and of Redis."""

    def __init__(self) -> None:
        super().__init__("stream")
        registry = self.registry
        self.event_to_visible_seconds = Histogram(
            "urm_event_to_visible_seconds",
            "Time from an event's acceptance to its result being readable.",
            buckets=_VISIBLE_BUCKETS,
            registry=registry,
        )
        self.events = Counter("urm_worker_events", "Events by outcome.", ["outcome"], registry=registry)
        self.inferences = Counter("urm_worker_user_inferences", "Users inferred.", registry=registry)
        self.results = Counter("urm_worker_results", "Results by outcome.", ["outcome"], registry=registry)
        self.tokens = Counter("urm_worker_tokens", "Prompt tokens encoded, padding left out.", registry=registry)
        self.joined = Counter(
            "urm_worker_history_events",
            "Events by how they joined their user's history: in_order, late, or repeated (delivered again).",
            ["how"],
            registry=registry,
        )
        self.batch_users = Histogram(
            "urm_worker_batch_users", "Users per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.unknown_items = Counter(
            "urm_worker_unknown_items", "Events of items that the item table does not have.", registry=registry
        )
        self.late_events = Counter(
            "urm_worker_late_events", "Events older than the features, taken as contained in them.", registry=registry
        )
        self.stream_entries = Gauge("urm_stream_entries", "Events not yet finished.", registry=None)
        self.lag_entries = Gauge("urm_stream_lag_entries", "Events not yet delivered.", registry=None)
        self.oldest_entry_age = Gauge(
            "urm_stream_oldest_entry_age_seconds", "Age of the oldest event not yet finished.", registry=None
        )
        self.pending_entries = Gauge("urm_stream_pending_entries", "Delivered, not acknowledged.", registry=None)
        self.dead_letters = Gauge("urm_dead_letters", "Events given up.", registry=None)
        self.redis_memory = Gauge("urm_redis_memory_bytes", "Memory that Redis uses.", registry=None)
        self.redis_memory_limit = Gauge(
            "urm_redis_memory_limit_bytes", "Memory that Redis may use; 0: no limit.", registry=None
        )
        self.redis_saves = Gauge("urm_redis_saves", "0: Redis' last write of its file on disk failed.", registry=None)
        self.seen = SeenGauges(
            self.stream_entries,
            self.lag_entries,
            self.oldest_entry_age,
            self.pending_entries,
            self.dead_letters,
            self.redis_memory,
            self.redis_memory_limit,
            self.redis_saves,
        )
        registry.register(self.seen)
        _start_at_zero(self.events, "done", "failed", "dead")
        _start_at_zero(self.results, "stored", "older")
        _start_at_zero(self.joined, "in_order", "late", "repeated")

    def note_redis(self, memory: Mapping[str, Any], persistence: Mapping[str, Any]) -> None:
        """Take what `INFO memory` and `INFO persistence` say; the look at stream and Redis is complete with it."""
        self.redis_memory.set(memory["used_memory"])
        self.redis_memory_limit.set(memory["maxmemory"])
        states = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
        self.redis_saves.set(all(persistence.get(state, "ok") == "ok" for state in states))
        self.seen.at = time.monotonic()


class BackfillMetrics:
    """What one shard of a back-fill counts, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.users = Counter(
            "urm_backfill_users",
            "Users by outcome: stored, current (a result of the release was there), forgotten (erased), failed.",
            ["outcome"],
            registry=self.registry,
        )
        _start_at_zero(self.users, "stored", "current", "forgotten", "failed")
        self.shard_users = Gauge("urm_backfill_shard_users", "Users of the shard.", registry=self.registry)
        self.shard_users_done = Gauge(
            "urm_backfill_shard_users_done", "Those finished, also by earlier processes.", registry=self.registry
        )
        self.waiting = Gauge("urm_backfill_waiting", "1: live events come first.", registry=self.registry)


class SeenGauges(Collector):
    """Gauges of what somebody has to look at: not exported before the first look, nor long after the last.

    A value that nobody measures any more would look like a calm stream, while Redis is away or a worker hangs.
    """

    def __init__(self, *gauges: Gauge) -> None:
        self.at = -math.inf  # of the last look
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """The values, while they are fresh."""
        if time.monotonic() - self.at < STALE_SECONDS:
            for gauge in self._gauges:
                yield from gauge.collect()


class ApiMetrics:
    """What the API counts, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "urm_api_request_seconds",
            "Time per request.",
            ["route", "status"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.events = Counter("urm_api_events", "Events by outcome.", ["outcome"], registry=self.registry)
        self.reads = Counter("urm_api_reads", "Answers by source and task.", ["source", "task"], registry=self.registry)
        self.ad_hoc = Counter("urm_api_ad_hoc", "Ad-hoc requests by status.", ["status"], registry=self.registry)
        self.result_age = Histogram(
            "urm_api_result_age_seconds",
            "Age of a result when it is read.",
            buckets=(1, 10, 60, 600, 3600, 86_400, 604_800),
            registry=self.registry,
        )
        _start_at_zero(self.events, "accepted", "duplicate", "refused", "user_refused", "conflict", "invalid")
        _start_at_zero(self.ad_hoc, "200", "503", "504")


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> None:
    """Serve /metrics in a thread until the process ends.

    Raises:
        UnavailableError: The port is taken.
    """
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UnavailableError(
            f"metrics on {host}:{port}",
            expected="a free port",
            got=error.strerror,
            remedy="choose another --metrics-port",
        ) from error
    log.info("metrics", url=f"http://{host}:{port}/metrics")


def _start_at_zero(counter: Counter, *values: str) -> None:
    """Export a counter of one label before it first counts: a rate sees no first step from nothing to one."""
    for value in values:
        counter.labels(value)
