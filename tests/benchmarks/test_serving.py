import asyncio
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.serving.__main__ import parse
from benchmarks.serving.client import Pool, get, post
from benchmarks.serving.load import Tally, arrivals, offer, percentiles, skewed
from benchmarks.serving.phases import Backlog
from components.stages.release import run as release_stage
from components.storage import run_stage
from tests.worlds import DEVICE, make_settings, run_python
from tests.worlds.tiny import ITEM_IDS, NUM_USERS, make_run


def test_a_stalled_server_is_charged_for_every_request_it_keeps_waiting():
    """Closed loops would send one request and measure one slow answer."""
    tally = Tally()
    due = np.linspace(0, 0.5, 51)

    async def serve() -> None:
        stalled = asyncio.Event()

        async def act(number: int) -> str:
            if number == 0:
                await asyncio.sleep(0.4)
                stalled.set()
            await stalled.wait()
            return "200"

        await offer(due, act, tally)

    asyncio.run(serve())
    assert tally.outcomes == {"200": 51}
    waits = 0.4 - due[due < 0.4]
    assert sum(tally.latency_ms) >= 1000 * waits.sum()
    assert tally.summary()["requests"] == 51


def test_arrivals_are_poisson_and_users_follow_zipf():
    due = arrivals(200, 100, np.random.default_rng(0))
    assert len(due) == pytest.approx(20_000, rel=0.05)
    gaps = np.diff(due)
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert skewed(4, 1.0).tolist() == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert skewed(4, 0.0).tolist() == [0.25] * 4
    assert percentiles([]) is None


def test_the_client_reads_answers_in_pieces_and_outlives_a_closed_connection():
    bodies: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            bodies.append(await reader.readexactly(4))
        writer.write(b"HTTP/1.1 202 Accepted\r\nContent-Length: 10\r\n\r\nhello")
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(b"world")
        writer.close()

    async def talk() -> list[tuple[int, bytes]]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, Pool("127.0.0.1", [server.sockets[0].getsockname()[1]], connections=1) as pool:
            answers = []
            for request in (get("/"), post("/", b"body"), get("/")):
                answers.append(await pool.ask(request))
                await asyncio.sleep(0.05)  # until the end of the connection is known
            return answers

    assert asyncio.run(talk()) == [(202, b"helloworld")] * 3
    assert bodies == [b"body"]


class Named(asyncio.Protocol):
    """Answers every request with its name."""

    def __init__(self, name: bytes) -> None:
        self._name = name

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n" + self._name)


def test_the_client_asks_like_servers_in_turn():
    async def talk() -> list[bytes]:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(partial(Named, name), "127.0.0.1", 0) for name in (b"a", b"b")]
        ports = [server.sockets[0].getsockname()[1] for server in servers]
        async with servers[0], servers[1], Pool("127.0.0.1", ports, connections=2) as pool:
            return [(await pool.ask(get("/")))[1] for _ in range(6)]

    assert asyncio.run(talk()) == [b"a", b"b"] * 3


def test_backlog_is_told_by_fifths():
    backlog = Backlog(entries=[0, 2] * 5, users=list(range(10)))
    assert backlog.summary()["entries"] == {"max": 2, "mean_by_fifth": [1.0] * 5}
    assert backlog.summary()["users"] == {"max": 9, "mean_by_fifth": [0.5, 2.5, 4.5, 6.5, 8.5]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--phases", "warm"], "expected some of capacity,steady,overload, got 'warm'"),
        (["--phases", "steady"], "none"),
        (["--apis", "0"], "option --apis: expected 1 or more, got 0"),
    ],
)
def test_a_wrong_option_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*words, "--output", "x.json"])
    assert message in capsys.readouterr().err


def test_the_benchmark_measures_a_real_runtime(tmp_path: Path) -> None:
    """All phases, of seconds; that every event becomes visible is checked, no speed is."""
    run_dir, settings = tmp_path / "run", make_settings(tmp_path / "home")
    config = make_run(run_dir, settings)
    catalogue = pa.table({"item_id": ITEM_IDS, "train_events": np.arange(len(ITEM_IDS))})
    pq.write_table(catalogue, run_dir / "features" / "catalogue.parquet")
    features = json.loads((run_dir / "features" / "result.json").read_text())
    features["outputs"]["catalogue"] = str(run_dir / "features" / "catalogue.parquet")
    (run_dir / "features" / "result.json").write_text(json.dumps(features))
    run_stage("release", release_stage, config=config, run_dir=str(run_dir), settings=settings)
    output, logs = tmp_path / "serving.json", tmp_path / "logs"
    started = time.monotonic()
    usual = ("--run-dir", run_dir, "--set", "recall.k=20", "--output")
    environment = {**os.environ, "URM_HOME": str(settings.home), "URM_DEVICE": DEVICE}
    options = "--capacity-seconds 2 --steady-seconds 3 --overload-seconds 3 --overload-users 5 --settle-seconds 1"
    options = (*f"{options} --read-rate 30 --apis 2 --logs".split(), logs)
    process = run_python("-m", "benchmarks.serving", *usual, output, *options, env=environment)
    assert process.returncode == 0, process.stderr
    print(f"{time.monotonic() - started:.0f} s")
    found = json.loads(output.read_text())
    assert found["users"] == NUM_USERS and found["tasks"] == 3
    assert found["capacity"]["beside_reads"]["users_per_second"] > 0
    for phase in ("steady", "overload"):
        load = found[phase]
        assert set(load["events"]["outcomes"]) == {"202"}
        assert load["worker"]["events_done"] >= load["events"]["requests"]
        assert load["worker"]["failed"] == load["worker"]["dead"] == 0
        assert load["events"]["followed"] == 6 and load["events"]["unseen"] == []
        assert set(load["reads"]["outcomes"]) <= {"model", "fallback"}
        assert load["backlog"]["users"]["max"] <= load["users"]
    assert found["overload"]["users"] == 5
    assert (logs / "recall-workers.log").exists()
    assert all(found["steady"]["busy_cores"][f"recall-api-{number}"] > 0 for number in range(2))

    # The release serves a second benchmark, of the API alone: whatever it costs, garbage is collected as it says.
    output = tmp_path / "reads.json"
    options = ("--reads", 320, "--repeats", 2)
    process = run_python("-m", "benchmarks.reads", *usual, output, *options, env=environment)
    assert process.returncode == 0, process.stderr
    figures = json.loads(output.read_text())
    assert list(figures) == ["usual", "frozen", "rarely"]
    assert all(len(repeats) == 2 and repeats[0]["milliseconds_a_read"] > 0 for repeats in figures.values())
    assert [repeat["full_collections"] for repeat in figures["rarely"]] == [0, 0]
