import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from fastapi.testclient import TestClient

from components.config import RecallConfig
from components.recall.api.app import create_app
from components.recall.state.events import decode_event
from components.recall.state.scripts import STREAM, accepted_key
from components.release.publication import SERVING, WANTED, Publication
from components.schemas.item_keys import item_key
from tests.components.recall.serving.test_engine import remake
from tests.worlds.api import EVENT, JSON, problem, read_metrics
from tests.worlds.recall import Release, StartWorker, wait_until


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


def test_an_item_is_named_by_the_shops_own_id(
    client: redis.Redis, recall_config: RecallConfig, releases: tuple[Release, Release], broken_bundle: Path
) -> None:
    """Titles that map another column than ingest's rule say which number an item has."""
    titles = pq.read_table(broken_bundle / "titles.parquet")
    skus = pa.array([f"SKU-{item_id}" for item_id in titles["item_id"].to_pylist()])
    place = titles.schema.get_field_index("external_id")
    (broken_bundle / "titles.parquet").unlink()
    pq.write_table(titles.set_column(place, titles.field(place), skus), broken_bundle / "titles.parquet")
    publication = Publication(release=remake(broken_bundle), bundle=str(broken_bundle), order=1)
    event = {"event_id": "e1", "user_id": "3"}
    with TestClient(create_app(releases[1].settings, recall_config)) as api:
        early = api.post("/v1/events", json={**event, "external_id": "SKU-1050"})
        assert early.status_code == 202  # no release is serving
        client.set(SERVING, publication.model_dump_json())
        later = [{**event, "event_id": name, "external_id": name} for name in ("SKU-1050", "unknown", " 7")]
        assert api.post("/v1/events", json=later).json()["accepted"] == 3
        both = api.post("/v1/events", json={**event, "item_id": 1050, "external_id": "SKU-1050"})
        assert "external_id or item_id, not both" in problem(both, 422, "invalid-request")
        items = api.get("/v1/users/nobody/recall", params={"k": 3}).json()["items"]
        assert [item["external_id"] for item in items] == [f"SKU-{item['item_id']}" for item in items]
    kept = [decode_event(fields["event"]).item_id for _, fields in client.xrange(STREAM)]
    assert kept == [item_key("SKU-1050"), 1050, item_key("unknown"), item_key(" 7")]


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
        (
            {"user_id": "3"},
            "body field 'body': expected external_id, item_id or query, got {'user_id': '3'}; see /docs",
        ),
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
