"""Real servers for tests: Redis and ASGI applications on free ports, and worker processes."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import uvicorn
from starlette.types import ASGIApp

from components.local.services import redis_server
from tests.worlds import wait_until

PROGRAM = os.environ.get("REDIS_SERVER") or redis_server()  # another version of Redis, or Valkey


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve_application(application: ASGIApp) -> Iterator[str]:
    """The address of an application that uvicorn serves in a thread."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)


class RedisServer:
    """A redis-server process with its state in a folder of its own; may be stopped and started again."""

    def __init__(self, folder: Path, appendfsync: str = "always", program: str = PROGRAM) -> None:
        self.folder = folder
        self.appendfsync = appendfsync
        self.program = program
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str, wait: bool = True) -> None:
        """Start it with more options; without `wait`, it may still load or not listen yet."""
        address = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command = [self.program, *address, "--appendonly", "yes", "--appendfsync", self.appendfsync, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if wait:
            self.wait_until_it_answers()

    def wait_until_it_answers(self) -> None:
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.02)
            finally:
                client.close()
        raise TimeoutError(f"redis-server on port {self.port} did not answer within 10 s")

    @property
    def append_only_file(self) -> Path:
        """Where writes go; from Redis 7 on a file in a folder."""
        return next(self.folder.glob("appendonlydir/*.incr.aof"), self.folder / "appendonly.aof")

    def pause(self) -> None:
        """Let it answer nobody, with its connections open."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of one test's own, which may be paused."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.resume()
    server.stop()
