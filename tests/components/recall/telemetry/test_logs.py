"""What the processes log as an operator starts them: JSON lines, and nobody's data in them."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis
import structlog

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.recall.operate.deadletters import list_letters
from components.recall.state.scripts import STREAM, history_keys, result_key
from components.recall.telemetry.logs import log_as_json, name_error
from tests.worlds.recall import Release, await_worker, runtime_process, serve_release, wait_until
from tests.worlds.servers import RedisServer, free_port

SECRETS = ("madame-bovary", "blood pressure", "arsenic")


def read_lines(log: Path) -> list[dict[str, object]]:
    """The lines of a log, each a JSON object, none with anybody's data."""
    text = log.read_text()
    assert [secret for secret in SECRETS if secret in text] == []
    return [json.loads(line) for line in text.splitlines()]


def test_api_logs_no_user_and_no_query_even_of_errors(
    client: redis.Redis, releases: tuple[Release, Release], redis_server: RedisServer, tmp_path: Path
) -> None:
    user, query, attribute = SECRETS
    log, port, metrics_port = tmp_path / "api.log", free_port(), free_port()
    serve_release(client, releases[0])
    event = {"user_id": user, "query": query, "attributes": {"note": attribute}}
    ports = ("--port", str(port), "--metrics-port", str(metrics_port))
    with log.open("wb") as stream, runtime_process(releases[0].settings, "serve", *ports, stderr=stream) as process:
        wait_until(lambda: log.exists() and "Uvicorn running" in log.read_text(), seconds=60)
        root = f"http://127.0.0.1:{port}/v1"
        assert httpx.post(f"{root}/events", json=event).status_code == 202
        assert httpx.post(f"{root}/events", json={**event, "ts": query}).status_code == 422
        assert httpx.get(f"{root}/users/{user}/recall").status_code == 200
        assert httpx.get(f"{root}/users/{user}/nothing").status_code == 404
        client.set(result_key(user, "next_purchase"), query)  # a key of another kind: redis-py quotes the command
        assert httpx.get(f"{root}/users/{user}/recall").status_code == 500
        client.config_set("maxmemory", 1)
        try:
            assert httpx.post(f"{root}/events", json=event).status_code == 503
        finally:
            client.config_set("maxmemory", 0)
        metrics = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 404
        for status in (200, 500):
            assert f'route="/v1/users/{{user_id}}/recall",status="{status}"}} 1.0' in metrics
        process.terminate()
        assert process.wait(timeout=30) == 0  # told to stop, it stops
    lines = read_lines(log)
    events = [str(line["event"]) for line in lines]
    assert "redis is unavailable" in events
    failed = [line for line in lines if "exception" in line]
    assert failed and all(str(line["exception"]).endswith("ResponseError") for line in failed)
    assert {"level", "timestamp"} <= set(lines[0])
    requests = [(line["route"], line["status"]) for line in lines if line["event"] == "request" and line["request_id"]]
    assert requests == [("/v1/users/{user_id}/recall", 500), ("/v1/events", 503)]


def test_worker_logs_no_user_and_no_query_even_of_what_it_gives_up(
    client: redis.Redis, releases: tuple[Release, Release], redis_server: RedisServer, tmp_path: Path
) -> None:
    user, query, attribute = SECRETS
    log = tmp_path / "worker.log"
    options = [part for value in ("max_wait_ms=5", "max_deliveries=1") for part in ("--set", f"recall.{value}")]
    with log.open("wb") as stream, runtime_process(releases[0].settings, "worker", *options, stderr=stream) as process:
        await_worker(client, process)
        roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=90)
        good = {"event_id": "e1", "user_id": user, "query": query, "attributes": {"note": attribute}}
        client.xadd(STREAM, {"event": json.dumps(good)})
        client.xadd(STREAM, {"event": json.dumps({"user_id": user, "behavior": query})})  # neither item nor query
        client.xadd(STREAM, {"event": json.dumps({**good, "colour": attribute})})
        wait_until(lambda: client.xlen(STREAM) == 0)
        client.set(history_keys(user)[0], query)  # a key of another kind: the script's error quotes its arguments
        client.xadd(STREAM, {"event": json.dumps({**good, "event_id": "e2"})})
        wait_until(lambda: len(list_letters(client)) == 2)
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert user in list_letters(client)[0].reason  # whoever may read the letters may read it
    lines = read_lines(log)
    events = [line["event"] for line in lines]
    assert {"worker started", "serving release", "batch", "dead letter", "worker stopped"} <= set(events)
    batch = lines[events.index("batch")]
    assert batch["users"] == 1 and str(batch["batch"]).endswith("/1")


@pytest.fixture
def clean_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_keeps_its_colours_and_is_not_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, clean_logging: None
) -> None:
    page = Terminal()
    monkeypatch.setattr("sys.stderr", page)
    structlog.configure(
        processors=[structlog.dev.ConsoleRenderer(colors=False)], logger_factory=structlog.PrintLoggerFactory(page)
    )
    log_as_json()
    structlog.get_logger().warning("dead letter", event_id="\x1b[2J\x07", entry_id="é")
    assert page.getvalue().split() == ["dead", "letter", "entry_id=é", r"event_id=\x1b[2J\x07"]


def test_lines_of_libraries_are_json_too(monkeypatch: pytest.MonkeyPatch, clean_logging: None) -> None:
    page = io.StringIO()
    monkeypatch.setattr("sys.stderr", page)
    log_as_json()
    try:
        raise KeyError("arsenic")
    except KeyError:
        logging.getLogger("some.library").exception("it failed")
    logging.getLogger("some.library").info("chatter")
    (line,) = page.getvalue().splitlines()
    parsed = json.loads(line)
    assert (parsed["event"], parsed["level"]) == ("it failed", "error")
    assert parsed["exception"].endswith("test_lines_of_libraries_are_json_too > KeyError")


def test_error_is_named_with_its_place_and_without_its_message(recall_config: RecallConfig) -> None:
    try:
        raise ValueError("arsenic")
    except ValueError as error:
        named = name_error(error)
    assert named.startswith("ValueError at test_logs.py:")
    assert name_error(ValueError("arsenic")) == "ValueError"
