import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import httpx
import pyarrow.parquet as pq
import pytest
import redis
from fastapi.testclient import TestClient

from components.config import ItemFilter, RecallConfig
from components.recall.api.app import create_app
from components.recall.state.events import EXAMPLE
from components.recall.state.scripts import STREAM, result_key, waiting_key
from components.recall.state.store import Result
from components.release.bundle import describe_files, name_release, read_manifest, write_manifest
from components.release.publication import SERVING, Publication
from tests.worlds import REPOSITORY
from tests.worlds.api import EVENT, problem, read_metrics
from tests.worlds.recall import Release, free_address, serve_release, wait_until
from tests.worlds.servers import RedisServer, own_server
from tests.worlds.tiny import LAST_EVENT

__all__ = ["own_server"]  # a fixture


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
            {
                "external_id": "1001",
                "item_id": 1001,
                "score": 3.0,
                "title": "item 1001",
                "category": ["food", "shelf 0"],
            },
            {"external_id": None, "item_id": 7, "score": 2.0, "title": None, "category": []},
        ],
    }


def test_what_is_forbidden_since_a_result_was_stored_is_left_out(
    client: redis.Redis, recall_config: RecallConfig, releases: tuple[Release, Release]
) -> None:
    serve_release(client, releases[0])
    items = [1001, 7, 1000, 1010]
    store_result(client, releases[0], task="next_purchase", item_ids=items)
    store_result(client, releases[0], task="new_item", item_ids=items)
    shelves = {item: category[-1] for item, category in categories(releases[0]).items()}
    filters = {
        "next_purchase": ItemFilter(deny_categories=(shelves[1001],)),
        "new_item": ItemFilter(deny_categories=("food",)),
    }
    app = create_app(releases[0].settings, recall_config.model_copy(update={"filters": filters}))
    with TestClient(app) as api:
        body = api.get("/v1/users/3/recall", params={"task": "next_purchase"}).raise_for_status().json()
        assert [(item["item_id"], item["score"]) for item in body["items"]] == [
            (item, float(len(items) - place)) for place, item in enumerate(items) if shelves.get(item) != shelves[1001]
        ]
        assert body["source"] == "model"
        answer = api.get("/v1/users/3/recall", params={"task": "new_item"}).raise_for_status().json()
        assert [item["item_id"] for item in answer["items"]] == [7]  # which the release does not know


def categories(release: Release) -> dict[int, list[str]]:
    rows = pq.read_table(release.bundle / "titles.parquet").to_pylist()
    return {row["item_id"]: row["category"] for row in rows}


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
    files = describe_files(bundle)
    name = name_release("urm", files)
    write_manifest(bundle, read_manifest(bundle).model_copy(update={"files": files, "release": name}))
    assert api.get("/v1/users/3/recall").json()["task"] == "next_purchase"
    publication = Publication(release=name, bundle=str(bundle), order=2)
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
