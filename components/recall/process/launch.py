"""Start a worker process, or several under a supervisor: threads, ports, signals."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import cast

import redis
import structlog

from components.config import RunConfig
from components.memory import disable_primitive_cache
from components.recall.process.forks import Program, prepare, run_urm
from components.recall.process.health import serve_health
from components.recall.process.signals import on_termination
from components.recall.process.supervisor import REDIS_TIMEOUT_SECONDS, Supervisor
from components.recall.telemetry.metrics import serve_metrics
from components.recall.telemetry.setup import open_tracing
from components.redis_client import open_redis, require_no_eviction
from components.release.publication import Publication
from components.settings import Settings

log = structlog.get_logger()

_NICENESS = 10  # where the API has cores in common with the workers, reads come first


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
    """
    if not ad_hoc:
        os.nice(_NICENESS)  # before there are threads: each has a niceness of its own, and inherits it
    disable_primitive_cache()
    # Not above: a supervisor needs neither torch nor the model.
    from transformers.utils.logging import disable_progress_bar

    from components.device import set_threads
    from components.recall.serving.engine import ServingRelease, load_release
    from components.recall.worker.adhoc import AdHocWorker
    from components.recall.worker.loop import ServingLoop
    from components.recall.worker.stream import RecallWorker

    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar is no JSON line
    set_threads(settings)

    def load(publication: Publication) -> ServingRelease:
        return load_release(publication, settings, config.release, config.recall.filters)

    client = open_redis(settings.redis_url)
    with contextlib.suppress(redis.RedisError):  # the worker waits for a Redis that is away
        require_no_eviction(cast("dict[str, object]", client.info("memory")))
    worker: ServingLoop
    if ad_hoc:
        worker = AdHocWorker(client, config.recall, load)
    else:
        worker = RecallWorker(client, config.recall, load, tracing=open_tracing(settings, "urm-recall-worker"))
    on_termination(worker.stop)
    if metrics_port:
        serve_metrics(worker.metrics.registry, host, metrics_port)
    try:
        worker.run()
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
        instances: Worker processes of the event stream.
        ad_hoc: Worker processes of ad-hoc requests, beside those.
        host: Address of /healthz, /readyz and /metrics.
        port: Their port; instance i has its own metrics on port + 1 + i.
        stuck_seconds: How long a heartbeat may be missing before its instance is killed.

    Raises:
        UnavailableError: The port is taken.
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
    supervisor = Supervisor(program, instances, threads, client, stuck_seconds, ad_hoc)
    on_termination(supervisor.stop)
    serve_health(lambda: supervisor.state, host, port)
    log.info("instances", count=instances, ad_hoc=ad_hoc, threads=threads, url=f"http://{host}:{port}/readyz")
    supervisor.run()
