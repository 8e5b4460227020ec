"""Start a worker process: threads, metrics port, signals."""

from __future__ import annotations

import structlog
import torch

# Before anything that imports Feast, which would switch this library to files shared between processes.
from prometheus_client import start_http_server

from components.config import RunConfig
from components.exceptions import UnavailableError
from components.recall.engine import load_release
from components.recall.worker import RecallWorker
from components.release.redis_client import open_redis
from components.settings import Settings

log = structlog.get_logger()


def run_worker(settings: Settings, config: RunConfig, host: str, metrics_port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: Where.
        config: What; its sections `recall` and `release` count.
        host: Address of the metrics port.
        metrics_port: 0 for none.

    Raises:
        UnavailableError: The metrics port is taken.
    """
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    worker = RecallWorker(
        open_redis(settings.redis_url),
        config.recall,
        lambda publication: load_release(publication, settings, config.release),
    )
    worker.handle_signals()
    if metrics_port:
        try:
            start_http_server(metrics_port, addr=host, registry=worker.metrics.registry)
        except OSError as error:
            raise UnavailableError(
                f"metrics on {host}:{metrics_port}",
                expected="a free port",
                got=error.strerror,
                remedy="choose another --metrics-port",
            ) from error
        log.info("metrics", url=f"http://{host}:{metrics_port}/metrics")
    worker.run()
