import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import fsspec
import httpx
import pytest
import redis
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from components.config import RecallConfig
from components.exceptions import ConfigError, ReleaseError, UnavailableError
from components.recall.api.app import create_app
from components.recall.api.problems import CODES
from components.recall.serving.catalogue import Catalogue, load_catalogue
from components.recall.state.events import EXAMPLE, decode_event
from components.recall.state.scripts import STREAM, accepted_key, result_key, waiting_key
from components.recall.state.store import Result
from components.release.bundle import describe_files, hash_manifest, read_manifest, write_manifest
from components.release.publication import SERVING, WANTED, Publication, send_heartbeat
from tests.worlds import REPOSITORY
from tests.worlds.recall import Release, StartWorker, free_address, serve_release, wait_until
from tests.worlds.servers import RedisServer, own_server
from tests.worlds.tiny import LAST_EVENT

__all__ = ["own_server"]  # a fixture
JSON = {"content-type": "application/json"}
EVENT = {"event_id": "e1", "user_id": "3", "item_id": 1050, "ts": LAST_EVENT.isoformat()}


def problem(response: Any, status: int, code: str = "") -> str:
    """The sentence of a problem document of this status, and of this kind where one is named."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    kind = body["type"].removeprefix("urn:problem-type:urm:")
    assert CODES[kind] == status and kind == (code or kind)
    return str(body["detail"])


def read_metrics(api: Any) -> str:
    """What the API's metrics port answers."""
    return generate_latest(api.app.state.metrics.registry).decode()


def store_result(client: redis.Redis, release: Release, *, task: str, item_ids: list[int]) -> None:
    """What the release has computed for user 3, an hour after the newest event."""
    result = Result(
        item_ids=item_ids,
        scores=[float(score) for score in range(len(item_ids), 0, -1)],
        release=release.name,
        event_id="e1",
        event_ts=LAST_EVENT,
        computed_at=LAST_EVENT + timedelta(hours=1),
    )
    client.hset(result_key("3", task), "body", result.model_dump_json())


def test_stored_result_is_read_with_titles(
    api: TestClient, client: redis.Redis, recall_config: RecallConfig, releases: tuple[Release, Release]
) -> None:
    store_result(client, releases[0], task="next_purchase", item_ids=[1001, 7, 1000])
    answer = api.get("/v1/users/3/recall", params={"task": "next_purchase", "k": 2}).json()
    assert answer == {
        "user_id": "3",
        "task": "next_purchase",
        "source": "model",
        "release": releases[0].name,
        "event_id": "e1",
        "event_ts": "2017-12-17T12:00:00Z",
        "computed_at": "2017-12-17T13:00:00Z",
        "query": None,
        "items": [
            {"item_id": 1001, "score": 3.0, "title": "item 1001", "category": ["food", "shelf 0"]},
            {"item_id": 7, "score": 2.0, "title": None, "category": []},
        ],
    }


def test_user_without_result_gets_the_popular_items_marked_as_such(api: TestClient) -> None:
    answer = api.get("/v1/users/never-seen/recall", params={"task": "new_item", "k": 3}).json()
    assert answer["source"] == "fallback"
    assert [item["item_id"] for item in answer["items"]] == [1000, 1001, 1002]
    assert answer["event_id"] is None and answer["computed_at"] is None
    metrics = read_metrics(api)
    assert 'urm_api_reads_total{source="fallback",task="new_item"}' in metrics
    assert 'urm_api_request_seconds_bucket{le="0.01",route="/v1/users/{user_id}/recall",status="200"}' in metrics


def test_a_batch_answers_as_the_single_reads_do(
    api: TestClient, client: redis.Redis, recall_config: RecallConfig, releases: tuple[Release, Release]
) -> None:
    store_result(client, releases[0], task="new_item", item_ids=[1001])
    users = ["4", "3", "4"]
    batch = api.post("/v1/users/recall", params={"task": "new_item", "k": 2}, json={"user_ids": users}).json()
    single = [api.get(f"/v1/users/{user}/recall", params={"task": "new_item", "k": 2}).json() for user in users]
    assert batch == {"answers": single}
    assert [answer["source"] for answer in single] == ["fallback", "model", "fallback"]


@pytest.mark.parametrize("user_id", ["a/b", "/", "recall", "a/recall", "a?b#c", "50%", "é ü", "two\nlines"])
def test_a_user_id_may_be_any_text(api: TestClient, user_id: str) -> None:
    address = f"/v1/users/{quote(user_id, safe='')}/recall"
    assert api.get(address).raise_for_status().json()["user_id"] == user_id
    assert 'route="/v1/users/{user_id}/recall",status="200"' in read_metrics(api)


def test_a_user_id_is_stripped_as_that_of_an_event_is(api: TestClient) -> None:
    assert api.get("/v1/users/%20a%20/recall").raise_for_status().json()["user_id"] == "a"
    for empty in ("%20", ""):
        assert "path field 'user_id': expected" in problem(api.get(f"/v1/users/{empty}/recall"), 422)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"user_ids": []}, "body field 'user_ids': expected .*at least 1 item"),
        ({"user_ids": ["1"] * 201}, "body field 'user_ids': expected .*at most 200 items"),
        ({"user_ids": [""]}, r"body field 'user_ids\.0': expected .*at least 1 character"),
        ({}, "body field 'user_ids': expected a value, got nothing"),
    ],
)
def test_a_bad_batch_is_refused(api: TestClient, body: object, sentence: str) -> None:
    detail = problem(api.post("/v1/users/recall", json=body), 422)
    assert re.match(sentence, detail), detail


def test_a_result_that_cannot_be_read_costs_nobody_else(
    api: TestClient, client: redis.Redis, releases: tuple[Release, Release]
) -> None:
    """As one of another version of the software."""
    store_result(client, releases[0], task="new_item", item_ids=[1001])
    client.hset(result_key("4", "new_item"), "body", '{"items": "of another form"}')
    answers = api.post("/v1/users/recall?task=new_item", json={"user_ids": ["3", "4"]}).raise_for_status().json()
    assert [answer["source"] for answer in answers["answers"]] == ["model", "fallback"]


def test_reads_that_come_at_once_share_a_round_trip_and_no_error(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig
) -> None:
    serve_release(client, releases[0])
    store_result(client, releases[0], task="new_item", item_ids=[1001])
    client.set(result_key("broken", "new_item"), "no hash")
    app = create_app(releases[0].settings, recall_config)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def read() -> list[httpx.Response]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://api") as api,
        ):
            await api.get("/readyz")
            client.config_resetstat()
            users = ["3", "4", "broken", "5"]
            return await asyncio.gather(*(api.get(f"/v1/users/{user}/recall?task=new_item") for user in users))

    answers = asyncio.run(read())
    assert [answer.status_code for answer in answers] == [200, 200, 500, 200]
    assert [answer.json().get("source") for answer in answers] == ["model", "fallback", None, "fallback"]
    assert [answer.json().get("user_id") for answer in answers] == ["3", "4", None, "5"]
    assert client.info("commandstats")["cmdstat_get"]["calls"] == 1  # of the serving release, once a round trip


def test_release_switch_is_followed(api: TestClient, client: redis.Redis, releases: tuple[Release, Release]) -> None:
    assert api.get("/readyz").json()["release"] == releases[0].name
    send_heartbeat(client, "w", "")
    serve_release(client, releases[1], order=2)
    client.config_resetstat()
    wait_until(lambda: api.get("/readyz").json() == {"status": "ok", "release": releases[1].name, "workers": 1})
    assert "cmdstat_scan" not in client.info("commandstats")  # there are millions of keys
    gone = Publication(release="urm-gone", bundle="/nowhere", order=3)
    client.set(SERVING, gone.model_dump_json())
    assert api.get("/v1/tasks").json()["release"] == releases[1].name  # what can be read goes on


class Loader:
    """Reads a release's tables when it is told to go on, and fails while it has an error."""

    def __init__(self) -> None:
        self.calls = 0
        self.go = threading.Event()
        self.error: Exception | None = None

    def __call__(self, *arguments: Any) -> Catalogue:
        self.calls += 1
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return load_catalogue(*arguments)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader()
    monkeypatch.setattr("components.recall.api.gateway.load_catalogue", loader)
    return loader


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The gateway's clock, which stands still."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("components.recall.api.gateway.time", clock)
    return clock


def test_reads_do_not_wait_for_the_next_release_nor_stop_when_it_cannot_be_read(
    api: TestClient,
    client: redis.Redis,
    releases: tuple[Release, Release],
    loader: Loader,
    clock: SimpleNamespace,
) -> None:
    def read() -> str:
        return str(api.get("/v1/users/3/recall").raise_for_status().json()["release"])

    loader.go.set()
    assert read() == releases[0].name
    loader.go.clear()
    serve_release(client, releases[1], order=2)
    assert {read() for _ in range(3)} == {releases[0].name}
    loader.error = RuntimeError("an error of a store's driver")
    with capture_logs() as logs:
        loader.go.set()
        wait_until(lambda: [line for line in logs if line["event"] == "release cannot be read"])
    assert "RuntimeError" in str(logs) and "driver" not in str(logs)
    clock.now += 29
    assert {read() for _ in range(3)} == {releases[0].name}
    assert loader.calls == 2
    loader.error = None
    clock.now += 2
    wait_until(lambda: read() == releases[1].name)
    assert loader.calls == 3


def test_tables_other_than_the_published_ones_are_not_served(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig, broken_bundle: Path
) -> None:
    digest = hash_manifest(broken_bundle)
    publication = Publication(release=releases[1].name, bundle=str(broken_bundle), manifest=digest, order=1)
    assert load_catalogue(publication, releases[0].settings).release == releases[1].name
    elsewhere = releases[0].settings.model_copy(update={"allowed_uris": "s3://urm"})
    with pytest.raises(ConfigError, match="expected one below s3://urm"):
        load_catalogue(publication, elsewhere)
    with (broken_bundle / "titles.parquet").open("ab") as titles:
        titles.write(b"x")
    with pytest.raises(ReleaseError, match=r"file titles.parquet: expected \d+ bytes, got"):
        load_catalogue(publication, releases[0].settings)
    write_manifest(
        broken_bundle, read_manifest(broken_bundle).model_copy(update={"files": describe_files(broken_bundle)})
    )
    with pytest.raises(ReleaseError, match="as it was published"):
        load_catalogue(publication, releases[0].settings)


def test_requests_that_find_no_release_readable_wait_for_one_try(
    client: redis.Redis,
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
    loader: Loader,
    clock: SimpleNamespace,
) -> None:
    serve_release(client, releases[0])
    app = create_app(releases[0].settings, recall_config)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api")
    loader.error = UnavailableError("store", expected="an answer", got="none", remedy="try again")

    async def ask() -> list[int]:
        asked = asyncio.gather(*(http.get("/v1/users/3/recall") for _ in range(20)))
        await asyncio.sleep(0.5)
        loader.go.set()
        return [answer.status_code for answer in await asked]

    async def ask_twice() -> tuple[list[int], list[int]]:
        async with app.router.lifespan_context(app), http:
            failed = await ask()
            loader.error = None
            clock.now += 31
            return failed, await ask()

    assert asyncio.run(ask_twice()) == ([503] * 20, [200] * 20)
    assert loader.calls == 2


def test_of_a_remote_bundle_the_api_fetches_no_model(releases: tuple[Release, Release], tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(releases[0].bundle), f"/{tmp_path.name}", recursive=True)
    publication = Publication(release=releases[0].name, bundle=f"memory://{tmp_path.name}", order=1)
    settings = releases[0].settings.model_copy(update={"cache_dir": str(tmp_path)})
    assert load_catalogue(publication, settings).release == releases[0].name
    names = {path.name for path in (tmp_path / "bundles").rglob("*") if path.is_file()}
    assert names == {"manifest.json", "tasks.json", "titles.parquet", "fallback.parquet"}


def test_events_are_accepted_once(api: TestClient, client: redis.Redis) -> None:
    first = api.post("/v1/events", json=EVENT)
    assert first.status_code == 202
    assert first.json() == {
        "accepted": 1,
        "duplicates": 0,
        "refused": 0,
        "events": [{"event_id": "e1", "status": "accepted", "type": None, "detail": None}],
    }
    again = api.post("/v1/events", json=[EVENT, {"event_id": "e1", "user_id": "4", "query": "pizza"}]).json()
    assert (again["accepted"], again["duplicates"]) == (1, 1)
    assert [event["status"] for event in again["events"]] == ["duplicate", "accepted"]
    kept = [decode_event(fields["event"]) for _, fields in client.xrange(STREAM)]
    assert [(event.user_id, event.item_id, event.query) for event in kept] == [("3", 1050, None), ("4", None, "pizza")]
    assert kept[1].event_id == again["events"][1]["event_id"]


def test_an_id_counts_per_user_and_its_content_stays(api: TestClient, client: redis.Redis) -> None:
    def post(**changes: Any) -> httpx.Response:
        return api.post("/v1/events", json={**EVENT, **changes})

    assert post().json()["accepted"] == 1
    assert post(user_id="4").json()["accepted"] == 1
    assert post(ts="2017-12-17T13:00:00+01:00", scenario="live").json()["duplicates"] == 1
    for changes in ({"item_id": 1051}, {"behavior": "view"}, {"query": "pizza"}, {"ts": "2017-12-17T12:00:01Z"}):
        assert problem(post(**changes), 409, "event-conflict").startswith("event 'e1': expected the content that")
    without_time = {"event_id": "e2", "user_id": "3", "item_id": 1}
    assert [api.post("/v1/events", json=without_time).json()["duplicates"] for _ in range(2)] == [0, 1]
    assert client.xlen(STREAM) == 3


def test_an_event_is_followed_to_the_results_that_know_it(
    api: TestClient, client: redis.Redis, start_worker: StartWorker, recall_config: RecallConfig
) -> None:
    def follow(event_id: str, user_id: str = "3") -> dict[str, Any]:
        found = api.get(f"/v1/events/{quote(event_id, safe='')}?user_id={user_id}").raise_for_status().json()
        assert api.post("/v1/events/lineage", json={"event_id": event_id, "user_id": user_id}).json() == found
        return dict(found)

    api.post("/v1/events", json={**EVENT, "event_id": "a/b"}).raise_for_status()
    waiting = follow("a/b")
    assert (waiting["state"], waiting["in_history"], waiting["tasks"]) == ("waiting", False, [])
    assert waiting["accepted_at"] and waiting["finished_at"] is None
    client.copy(SERVING, WANTED)
    worker = start_worker()
    wait_until(lambda: client.xlen(STREAM) == 0)
    done = follow("a/b")
    assert (done["state"], done["in_history"], done["tasks"]) == ("done", True, ["next_purchase", "new_item"])
    assert done["finished_at"] >= done["accepted_at"] == waiting["accepted_at"]
    assert done["batch"] == "worker-a/1" and done["release"] == worker._source.serving.name
    client.delete(accepted_key("3", "a/b"))  # as after a day
    assert (follow("a/b")["state"], follow("a/b")["accepted_at"]) == ("done", None)
    client.hset(accepted_key("3", "bad"), mapping={"entry": "1-1", "user": "3", "dead": "2.5"})
    assert (follow("bad")["state"], follow("bad")["finished_at"]) == ("dead", "1970-01-01T00:00:02.500000Z")
    assert "expected one of this user" in problem(api.get("/v1/events/a%2Fb?user_id=4"), 404, "unknown-event")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"user_id": "3"}, "body field 'body': expected item_id or query, or both, got {'user_id': '3'}; see /docs"),
        ({"item_id": 1}, "body field 'user_id': expected a value, got nothing"),
        ({**EVENT, "item_id": "x"}, "body field 'item_id': expected a valid integer, .* got 'x'"),
        ({**EVENT, "item_id": -1}, "body field 'item_id': expected greater than or equal to 0, got -1"),
        ({**EVENT, "colour": "red"}, "body field 'colour': expected known fields only, got this one"),
        ({**EVENT, "ts": "2017-01-01T00:00:00"}, "body field 'ts': expected timezone info"),
        ({**EVENT, "ts": "2200-01-01T00:00:00Z"}, "event 'e1', field 'ts': expected at most 300 s in the future"),
        ([{**EVENT, "user_id": ""}], r"body field '0\.user_id': expected .*at least 1 character"),
        ([{"user_id": "3", "item_id": 1}], r"body field '0\.event_id': expected a value, got nothing"),
        ([], "body field 'body': expected .*at least 1 item"),
        ([EVENT] * 1001, "body field 'body': expected .*at most 1000 items"),
        ("text", "body field 'body': expected a valid dictionary"),
    ],
)
def test_bad_events_are_refused_whole(api: TestClient, client: redis.Redis, body: object, sentence: str) -> None:
    response = api.post("/v1/events", json=body)
    detail = problem(response, 422)
    assert re.match(sentence, detail), detail
    assert len(detail) < 400
    assert client.xlen(STREAM) == 0


def test_everything_that_is_wrong_is_named(api: TestClient) -> None:
    body = api.post("/v1/events", json=[{**EVENT, "item_id": "x", "colour": "red"}, {"item_id": 1}]).json()
    assert body["title"] == "Invalid request"
    assert [(error["place"], error["field"]) for error in body["errors"]] == [
        ("body", "0.item_id"),
        ("body", "0.colour"),
        ("body", "1.event_id"),
        ("body", "1.user_id"),
    ]
    assert body["errors"][2]["detail"] == "expected a value, got nothing"
    assert body["detail"].startswith("body field '0.item_id': expected a valid integer")


def test_body_that_is_no_json_is_refused(api: TestClient) -> None:
    response = api.post("/v1/events", content=b"{", headers=JSON)
    assert "expected valid JSON" in problem(response, 422)


@pytest.mark.parametrize("path", ["/v1/events", "/v1/recall", "/v1/users/recall"])
def test_body_that_is_no_text_is_refused(api: TestClient, path: str) -> None:
    response = api.post(path, content=b'{"user_id": "\xff"}', headers=JSON)
    assert problem(response, 400) == "body: expected JSON in UTF-8, got something else; see /docs for an example."


def test_an_endless_name_of_a_field_is_not_repeated(api: TestClient) -> None:
    for body in ({**EVENT, "x" * 100_000: 1}, [EVENT, {**EVENT, "x" * 100_000: 1}]):
        answer = api.post("/v1/events", json=body)
        assert "known fields only" in answer.text and len(answer.content) < 1000


def test_a_bad_event_of_a_list_refuses_itself_alone(api: TestClient, client: redis.Redis) -> None:
    api.post("/v1/events", json=EVENT).raise_for_status()
    batch = [
        {**EVENT, "event_id": "e2"},
        {**EVENT, "event_id": "e3", "user_id": ""},
        EVENT,
        {**EVENT, "item_id": 7},
        {**EVENT, "event_id": "e4", "ts": "2200-01-01T00:00:00Z"},
        "no event",
        {"user_id": "3", "item_id": 1},
    ]
    answer = api.post("/v1/events", json=batch)
    assert answer.status_code == 207 and "retry-after" not in answer.headers
    body = answer.json()
    assert (body["accepted"], body["duplicates"], body["refused"]) == (1, 1, 5)
    rows = [(row["event_id"], row["status"], (row["type"] or "").rpartition(":")[2]) for row in body["events"]]
    assert rows == [
        ("e2", "accepted", ""),
        (None, "refused", "invalid-request"),
        ("e1", "duplicate", ""),
        ("e1", "refused", "event-conflict"),
        ("e4", "refused", "invalid-request"),
        (None, "refused", "invalid-request"),
        (None, "refused", "invalid-request"),
    ]
    assert body["events"][1]["detail"].startswith("body field '1.user_id': expected ")
    assert body["events"][6]["detail"].startswith("body field '6.event_id': expected a value")
    assert client.xlen(STREAM) == 2
    assert 'urm_api_events_total{outcome="invalid"} 4.0' in read_metrics(api)


def test_full_stream_asks_to_come_back(client: redis.Redis, releases: tuple[Release, Release]) -> None:
    config = RecallConfig(max_stream_length=2)
    with TestClient(create_app(releases[0].settings, config)) as api:
        batch = [{**EVENT, "event_id": f"e{number}"} for number in range(3)]
        response = api.post("/v1/events", json=batch)
        assert response.status_code == 207 and int(response.headers["retry-after"]) > 0
        assert [row["status"] for row in response.json()["events"]] == ["accepted", "accepted", "refused"]
        assert response.json()["events"][2]["type"].endswith(":stream-full")
        response = api.post("/v1/events", json=[batch[2], {**EVENT, "user_id": ""}])
        detail = problem(response, 429, "stream-full")
        assert detail.startswith("event 'e2': expected room below 2 waiting events, got a full stream")
        assert [error["field"] for error in response.json()["errors"]] == ["1.user_id", "0"]
        assert int(response.headers["retry-after"]) > 0
        client.delete(STREAM)
        again = api.post("/v1/events", json=batch).json()
        assert (again["accepted"], again["duplicates"]) == (1, 2)


def test_a_user_with_too_much_waiting_is_asked_to_come_back_and_others_are_not(
    client: redis.Redis, releases: tuple[Release, Release]
) -> None:
    with TestClient(create_app(releases[0].settings, RecallConfig(max_waiting_per_user=2))) as api:
        batch = [{**EVENT, "user_id": "bot", "event_id": f"e{number}"} for number in range(3)]
        response = api.post("/v1/events", json=batch)
        assert response.status_code == 207 and int(response.headers["retry-after"]) > 0
        assert [row["status"] for row in response.json()["events"]] == ["accepted", "accepted", "refused"]
        detail = problem(api.post("/v1/events", json=batch[2]), 429, "user-backlog-full")
        assert detail.startswith("event 'e2': expected fewer than 2 waiting events of its user, got as many")
        assert api.post("/v1/events", json={**EVENT, "user_id": "other", "event_id": "of another"}).status_code == 202
        assert client.xlen(STREAM) == 3


def test_unknown_task_names_the_known_ones(api: TestClient) -> None:
    detail = problem(api.get("/v1/users/3/recall", params={"task": "gift"}), 404)
    assert detail == (
        "task: expected one of next_purchase, new_item, text_query, got 'gift'; name a task of the serving release."
    )


@pytest.mark.parametrize(
    ("k", "sentence"),
    [("0", "greater than or equal to 1, got '0'"), ("11", "less than or equal to 10, got '11'"), ("x", "integer")],
)
def test_k_out_of_range_is_refused(api: TestClient, k: str, sentence: str) -> None:
    detail = problem(api.get("/v1/users/3/recall", params={"k": k}), 422)
    assert detail.startswith("query field 'k': expected ")
    assert sentence in detail


def test_the_default_task_is_the_first_of_the_release(
    api: TestClient, client: redis.Redis, releases: tuple[Release, Release], tmp_path: Path
) -> None:
    """A release need not have a task of any fixed name."""
    bundle = Path(shutil.copytree(releases[1].bundle, tmp_path / "bundle"))
    tasks = json.loads((bundle / "tasks.json").read_text())
    (bundle / "tasks.json").write_text(json.dumps([task for task in tasks if task["name"] == "new_item"]))
    manifest = read_manifest(bundle).model_copy(update={"files": describe_files(bundle)})
    write_manifest(bundle, manifest)
    assert api.get("/v1/users/3/recall").json()["task"] == "next_purchase"
    publication = Publication(release=releases[1].name, bundle=str(bundle), order=2)
    client.set(SERVING, publication.model_dump_json())
    wait_until(lambda: api.get("/v1/tasks").json()["tasks"] == ["new_item"])
    assert api.get("/v1/users/3/recall").json()["task"] == "new_item"
    assert api.post("/v1/users/recall", json={"user_ids": ["3"]}).json()["answers"][0]["task"] == "new_item"
    detail = problem(api.post("/v1/recall", json={"user_id": "3"}), 503, "no-ad-hoc-worker")  # not an unknown task
    assert detail.startswith("ad-hoc recall: expected an ad-hoc worker")


def test_answers_are_not_to_be_stored(api: TestClient) -> None:
    for answer in (api.get("/v1/users/3/recall"), api.post("/v1/events", json=EVENT), api.get("/nowhere")):
        assert answer.headers["cache-control"] == "no-store"


def test_operation_ids_stay_as_clients_were_generated_from_them(api: TestClient) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {
        f"{method} {path}": operation["operationId"] for path in paths for method, operation in paths[path].items()
    } == {
        "post /v1/events": "post_events",
        "get /v1/events/{event_id}": "get_event",
        "post /v1/events/lineage": "read_event",
        "get /v1/users/{user_id}/recall": "get_recall",
        "post /v1/users/recall": "read_recall",
        "get /v1/tasks": "get_tasks",
        "post /v1/recall": "ask_recall",
        "get /healthz": "get_health",
        "get /readyz": "get_readiness",
        "get /readyz/intake": "get_intake_readiness",
    }


def test_unknown_path_and_method_are_problems_too(api: TestClient) -> None:
    for path in ("/v2", "/v1/tasks/"):
        assert f"request GET {path}: expected a path" in problem(api.get(path), 404)
    refused = api.delete("/v1/events")
    assert "request DELETE /v1/events" in problem(refused, 405, "wrong-method")
    assert refused.headers["allow"] == "POST"


def test_without_a_release_reads_are_refused_and_events_kept(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig
) -> None:
    with TestClient(create_app(releases[0].settings, recall_config)) as api:
        detail = problem(api.get("/v1/users/3/recall"), 503)
        assert detail.startswith("recall: expected a serving release, got none yet; run `urm release`")
        assert "serving release" in problem(api.get("/readyz"), 503)
        assert api.get("/readyz/intake").json()["status"] == api.get("/healthz").json()["status"] == "ok"
        assert api.post("/v1/events", json=EVENT).status_code == 202
        client.set(SERVING, Publication(release="urm-x", bundle="/nowhere", order=1).model_dump_json())
        assert "release urm-x: expected its bundle to be readable" in problem(api.get("/v1/tasks"), 503)


def test_redis_that_is_away_is_a_problem(releases: tuple[Release, Release], recall_config: RecallConfig) -> None:
    settings = releases[0].settings.model_copy(update={"redis_url": f"redis://{free_address()}/0"})
    with TestClient(create_app(settings, recall_config)) as api:
        for response in (
            api.get("/v1/users/3/recall"),
            api.post("/v1/events", json=EVENT),
            api.get("/readyz"),
            api.get("/readyz/intake"),
            api.get("/v1/tasks"),
        ):
            assert "expected Redis to serve, got no" in problem(response, 503)
            assert int(response.headers["retry-after"]) > 0
        assert api.get("/healthz").status_code == 200


def test_an_api_on_a_replica_answers_reads_and_takes_no_events(
    client: redis.Redis, redis_server: RedisServer, releases: tuple[Release, Release], own_server: RedisServer
) -> None:
    serve_release(client, releases[0])
    store_result(client, releases[0], task="next_purchase", item_ids=[1001])
    with redis.Redis.from_url(own_server.url, decode_responses=True) as replica:
        replica.replicaof("127.0.0.1", redis_server.port)
        wait_until(lambda: replica.get(SERVING))
        settings = releases[0].settings.model_copy(update={"redis_url": own_server.url})
        limited = RecallConfig(requests_per_minute=1)  # which a replica cannot count
        with TestClient(create_app(settings, limited)) as api:
            for item in (1001, 1002):  # what comes later arrives, too
                store_result(client, releases[0], task="next_purchase", item_ids=[item])
                client.wait(1, 5000)
                answer = api.get("/v1/users/3/recall?task=next_purchase").json()
                assert (answer["source"], answer["items"][0]["item_id"]) == ("model", item)
            assert api.get("/readyz").json()["release"] == releases[0].name
            problem(api.post("/v1/events", json=EVENT), 503, "redis-unavailable")
    assert client.xlen(STREAM) == 0


@pytest.fixture(params=["READONLY", "MISCONF", "OOM", "MASTERDOWN"])
def sick_redis(request: pytest.FixtureRequest, client: redis.Redis, redis_server: RedisServer) -> Iterator[str]:
    """A Redis that answers and refuses to work, as after a fail-over, on a full disk, or at its limit."""
    dump = redis_server.folder / "dump.rdb"
    try:
        if request.param == "OOM":
            client.config_set("maxmemory", 1)
        elif request.param == "MISCONF":
            dump.unlink(missing_ok=True)
            dump.mkdir()
            client.bgsave()
            wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        else:
            client.config_set("replica-serve-stale-data", "no" if request.param == "MASTERDOWN" else "yes")
            client.replicaof(*free_address().split(":"))
        yield request.param
    finally:
        client.replicaof("NO", "ONE")
        client.config_set("maxmemory", 0)
        if dump.is_dir():
            dump.rmdir()
            client.bgsave()
            wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")


def test_redis_that_refuses_to_work_is_a_problem_to_be_tried_again(api: TestClient, sick_redis: str) -> None:
    answers = [api.post("/v1/events", json=body) for body in (EVENT, [EVENT, {**EVENT, "event_id": "READONLY"}])]
    if sick_redis == "MASTERDOWN":
        answers += [api.get("/v1/users/3/recall"), api.get("/readyz/intake")]
    else:  # reads go on, so that nothing takes this process away from them
        assert api.get("/readyz/intake").status_code == api.get("/v1/users/3/recall").status_code == 200
    for response in answers:
        assert "expected Redis to serve" in problem(response, 503)
        assert int(response.headers["retry-after"]) > 0


def test_an_error_of_a_command_is_no_sick_redis_whatever_a_user_wrote(api: TestClient, client: redis.Redis) -> None:
    client.set(waiting_key("3"), "no hash")
    assert api.post("/v1/events", json={**EVENT, "query": "MISCONF READONLY BUSY"}).status_code == 500


def test_docs_render_without_internet_and_show_examples(api: TestClient) -> None:
    page = api.get("/docs").text
    assert "://" not in page
    for path in ("swagger-ui-bundle.js", "swagger-ui.css"):
        asset = api.get(f"/static-offline-docs/{path}")
        assert asset.status_code == 200 and path in page and len(asset.content) > 10_000
    document = api.get("/openapi.json").json()
    body = document["paths"]["/v1/events"]["post"]["requestBody"]["content"]["application/json"]
    assert body["examples"]["purchase"]["value"] == EXAMPLE
    for value in (example["value"] for example in body["examples"].values()):
        assert api.post("/v1/events", json=value).status_code == 202
    recall = document["paths"]["/v1/users/{user_id}/recall"]["get"]["responses"]
    assert "application/problem+json" in recall["404"]["content"]
    assert "Problem" in document["components"]["schemas"]


def test_api_process_loads_no_model_code() -> None:
    program = (
        "import sys, components.recall.api.app, components.cli.app, components.settings as s, components.config as c;"
        "components.recall.api.app.create_app(s.Settings(), c.RecallConfig());"
        "print([name for name in sys.modules if name == 'components.urm' or name.startswith('components.urm.')"
        " or name in ('torch', 'transformers', 'feast', 'mlflow', 'faiss')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"


def test_a_burst_waits_for_connections_and_is_answered(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig
) -> None:
    serve_release(client, releases[0])
    app = create_app(releases[0].settings, recall_config)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api")

    async def burst() -> list[httpx.Response]:
        async with app.router.lifespan_context(app), http:  # it closes the connections
            await http.get("/v1/users/3/recall")  # reads the release's titles
            client.client_pause(300)
            return await asyncio.gather(*(http.get("/v1/users/3/recall") for _ in range(300)))

    assert {answer.status_code for answer in asyncio.run(burst())} == {200}
    assert client.info("clients")["connected_clients"] < 30
