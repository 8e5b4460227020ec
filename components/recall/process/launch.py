"""Start a worker process, or several under a supervisor: threads, ports, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import redis
import structlog

from components.config import RunConfig
from components.exceptions import UrmError
from components.memory import disable_primitive_cache
from components.recall.process.forks import Program, prepare, run_urm
from components.recall.process.health import serve_health
from components.recall.process.signals import on_termination
from components.recall.process.supervisor import REDIS_TIMEOUT_SECONDS, Supervisor
from components.recall.telemetry.metrics import serve_metrics
from components.recall.telemetry.setup import open_tracing
from components.recall.telemetry.tracing import Tracing
from components.redis_client import open_redis, require_no_eviction
from components.release.publication import Publication, read_environment
from components.settings import Settings

if TYPE_CHECKING:
    from components.recall.worker.source import Load

log = structlog.get_logger()

_NICENESS = 10  # where the API has cores in common with the workers, reads come first
_LEAST = 19  # niceness of what may wait for everything else


def run_worker(settings: Settings, config: RunConfig, host: str, metrics_port: int, ad_hoc: bool = False) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: Where.
        config: What; its sections `recall` and `release` count.
        host: Address of the metrics port.
        metrics_port: 0 for none.
        ad_hoc: Whether to answer ad-hoc requests instead of the event stream.

    Raises:
        UnavailableError: The metrics port is taken.
        UrmError: On Kubernetes, where the pod names the release: it cannot be loaded.
    """
    load = _prepare_model(settings, config, 0 if ad_hoc else _NICENESS)
    from components.recall.worker.adhoc import AdHocWorker
    from components.recall.worker.fixed import FixedRelease
    from components.recall.worker.loop import MakeSource, ServingLoop
    from components.recall.worker.stream import RecallWorker
    from components.recall.worker.switch import ReleaseSwitch

    source: MakeSource = ReleaseSwitch
    if settings.deploy_to == "kubernetes":
        source = partial(FixedRelease, read_environment(settings), announces=not ad_hoc)
    client = _connect(settings)
    worker: ServingLoop
    tracing = Tracing()
    if ad_hoc:
        worker = AdHocWorker(client, config.recall, load, source=source)
    else:
        tracing = open_tracing(settings, "urm-recall-worker")
        worker = RecallWorker(client, config.recall, load, tracing=tracing, source=source)
    on_termination(worker.stop)
    if metrics_port:
        serve_metrics(worker.metrics.registry, host, metrics_port)
    try:
        _run(worker.run)
    finally:
        tracing.close()
    if worker.loading:
        os._exit(0)  # else the process would wait for the thread that loads, which nothing can interrupt


def run_backfill(
    settings: Settings,
    config: RunConfig,
    shard: int,
    shards: int,
    users_per_second: float,
    host: str,
    metrics_port: int,
) -> None:
    """Back-fill one shard of the known users, at the lowest priority, until it is finished, SIGTERM or SIGINT.

    Args:
        settings: Where.
        config: What; its sections `recall` and `release` count.
        shard: From 0 to `shards` - 1.
        shards: How many.
        users_per_second: Most users to compute; 0: no limit.
        host: Address of the metrics port.
        metrics_port: 0 for none.

    Raises:
        UnavailableError: The metrics port is taken.
        UrmError: No release serves, or it cannot be loaded.
    """
    load = _prepare_model(settings, config, _LEAST)
    from components.recall.serving.fetching import list_users
    from components.recall.worker.backfill import Backfill

    users = partial(list_users, settings=settings)
    backfill = Backfill(_connect(settings), config.recall, load, users, shard, shards, users_per_second)
    on_termination(backfill.stop)
    if metrics_port:
        serve_metrics(backfill.metrics.registry, host, metrics_port)
    _run(backfill.run)
    if not backfill.finished:
        sys.exit(128 + signal.SIGTERM)


def _prepare_model(settings: Settings, config: RunConfig, niceness: int) -> Load:
    """Import what computes, in a process of this niceness; what loads a release."""
    os.nice(niceness)  # before there are threads: each has a niceness of its own, and inherits it
    disable_primitive_cache()
    # Not above: a supervisor needs neither torch nor the model.
    from transformers.utils.logging import disable_progress_bar

    from components.device import set_threads
    from components.recall.serving.engine import ServingRelease, load_release

    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar is no JSON line
    set_threads(settings)

    def load(publication: Publication) -> ServingRelease:
        return load_release(publication, settings, config.release, config.recall.filters)

    return load


def _connect(settings: Settings) -> redis.Redis:
    client = open_redis(settings.redis_url)
    with contextlib.suppress(redis.RedisError):  # the worker waits for a Redis that is away
        require_no_eviction(cast("dict[str, object]", client.info("memory")))
    return client


def _run(run: Callable[[], None]) -> None:
    try:
        run()
    except UrmError:
        raise
    except Exception:  # Python would print its message, which may quote an event
        log.critical("worker failed", exc_info=True)
        sys.exit(1)


def run_instances(
    settings: Settings,
    arguments: Sequence[str],
    instances: int,
    ad_hoc: int,
    host: str,
    port: int,
    stuck_seconds: float,
) -> None:
    """Serve with several workers until SIGTERM or SIGINT; `settings.num_threads` is that of each.

    Args:
        settings: Where.
        arguments: Of `urm recall worker`, but for the metrics port.
        instances: Worker processes of the event stream, which may be none.
        ad_hoc: Worker processes of ad-hoc requests, beside those.
        host: Address of /healthz, /readyz and /metrics.
        port: Their port; instance i has its own metrics on port + 1 + i.
        stuck_seconds: How long a heartbeat may be missing before its instance is killed.

    Raises:
        UnavailableError: The port is taken.
        RelayedError: On Kubernetes: what ended an instance, if that was a mistake in the input.
    """

    def program(number: int) -> Program:
        own = ["--host", host, "--metrics-port", str(port + 1 + number)]
        mode = ["--ad-hoc"] if number >= instances else []
        return run_urm, (["recall", "worker", *arguments, *own, *mode],)

    threads = settings.num_threads or 1
    # For the fork server and the instances: the libraries read it when they are imported. Arrow's own allocator would
    # keep what reading the tables of a release took.
    os.environ.update(URM_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads), ARROW_DEFAULT_MEMORY_POOL="system")
    disable_primitive_cache()  # as above
    prepare()
    client = open_redis(settings.redis_url, REDIS_TIMEOUT_SECONDS)
    in_pod = settings.deploy_to == "kubernetes"
    supervisor = Supervisor(program, instances, threads, client, stuck_seconds, ad_hoc, ends_with_instance=in_pod)
    on_termination(supervisor.stop)
    serve_health(lambda: supervisor.state, host, port)
    log.info("instances", count=instances, ad_hoc=ad_hoc, threads=threads, url=f"http://{host}:{port}/readyz")
    supervisor.run()
