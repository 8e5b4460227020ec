"""Ad-hoc recall: the API, the queue in a real Redis, and ad-hoc workers with a real model."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from fastapi.testclient import TestClient

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import ConfigError, UnavailableError
from components.recall.api.app import create_app
from components.recall.operate.forget import forget_user
from components.recall.operate.intake import feed
from components.recall.serving.context import KnownHistory, build_context
from components.recall.serving.engine import ServingRelease, load_release
from components.recall.state.adhoc import AdHocQueue, AdHocRefusal, AdHocRequest, enqueue_arguments, request_and_wait
from components.recall.state.scripts import AD_HOC_REQUESTS, AD_HOC_WORKERS, ENQUEUE, STREAM
from components.recall.state.store import UserStore
from components.recall.worker.adhoc import AdHocWorker
from components.release.publication import WORKERS, Publication, live_workers, send_heartbeat
from components.urm.data.request import RecallRequest
from tests.components.recall.api.test_app import problem, read_metrics
from tests.worlds import run_python
from tests.worlds.recall import (
    POISON_ITEM,
    Loader,
    Release,
    StartWorker,
    add_history,
    await_worker,
    make_event,
    runtime_environment,
    runtime_process,
    serve_release,
    wait_until,
)
from tests.worlds.tiny import known_items

WORDS = "Often new purchases"


@pytest.fixture
def ad_hoc(
    client: redis.Redis, releases: tuple[Release, Release], start_worker: StartWorker
) -> tuple[AdHocWorker, Publication]:
    """An ad-hoc worker that serves the first release, and no other worker."""
    worker = start_worker("ad-hoc", kind=AdHocWorker)
    publication = roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    wait_until(lambda: client.zscore(AD_HOC_WORKERS, "ad-hoc"))
    return worker, publication


@pytest.fixture
def hasty(client: redis.Redis, releases: tuple[Release, Release]) -> Iterator[TestClient]:
    """An API whose ad-hoc requests wait for a third of a second, two of them at most."""
    serve_release(client, releases[0])
    config = RecallConfig(k=10, ad_hoc_queue=2, ad_hoc_deadline_seconds=0.3)
    with TestClient(create_app(releases[0].settings, config), raise_server_exceptions=False) as http:
        yield http


def push(client: redis.Redis, request: AdHocRequest, config: RecallConfig) -> int:
    arguments = enqueue_arguments(request, config)
    return int(client.register_script(ENQUEUE)(keys=arguments["keys"], args=arguments["args"]))


def test_answer_is_the_models_with_the_guidance_behind_the_prompt(
    api: TestClient,
    client: redis.Redis,
    releases: tuple[Release, Release],
    ad_hoc: tuple[AdHocWorker, Publication],
    recall_config: RecallConfig,
) -> None:
    event = make_event()
    add_history(client, recall_config, [event])
    release = load_release(ad_hoc[1], releases[0].settings, releases[0].config.release)
    context = build_context(release.read_histories(["3"])["3"], [event], release.rule)
    task = next(task for task in release.tasks if task.name == "new_item")
    found = {}
    for guidance in (None, WORDS):
        answer = api.post("/v1/recall", json={"user_id": "3", "task": "new_item", "k": 4, "guidance": guidance}).json()
        ((items, scores),) = release.recommend([RecallRequest(context, task, guidance=guidance)], 4)
        assert [item["item_id"] for item in answer["items"]] == items
        assert [item["score"] for item in answer["items"]] == pytest.approx(scores, abs=1e-4)
        assert not set(items) & {*known_items(3), event.item_id}  # exclude_bought, live events too
        found[guidance] = scores
        assert answer["items"][0]["title"] == f"item {items[0]}"
        assert (answer["source"], answer["guidance"], answer["query"]) == ("model", guidance, None)
        assert (answer["release"], answer["event_id"]) == (releases[0].name, event.event_id)
        assert answer["computed_at"] is not None
    assert found[None] != pytest.approx(found[WORDS], abs=1e-4)  # words do steer
    assert UserStore(client, recall_config).result("3", "new_item") is None  # nothing is stored


def test_an_erased_user_has_no_history_before_the_next_event(
    api: TestClient, client: redis.Redis, ad_hoc: tuple[AdHocWorker, Publication], recall_config: RecallConfig
) -> None:
    def ask(user: str) -> Any:
        return api.post("/v1/recall", json={"user_id": user, "task": "next_purchase"}).json()["items"]

    known, stranger = ask("3"), ask("nobody")
    assert known != stranger
    forget_user(client, "3")
    assert ask("3") == stranger
    add_history(client, recall_config, [make_event()])
    assert ask("3") not in (known, stranger)


def test_query_tasks_ask_for_words_and_new_users_are_welcome(
    api: TestClient, ad_hoc: tuple[AdHocWorker, Publication]
) -> None:
    answer = api.post("/v1/recall", json={"user_id": "nobody", "task": "text_query", "query": "shelf 3"}).json()
    assert len(answer["items"]) == 10 and answer["query"] == "shelf 3"
    assert answer["event_id"] is None and answer["event_ts"] is None
    assert api.get("/v1/tasks").json()["query_tasks"] == ["text_query"]
    detail = problem(api.post("/v1/recall", json={"user_id": "3", "task": "text_query"}), 422)
    assert detail.startswith("body field 'query', task 'text_query': expected the words that the user searched for")
    detail = problem(api.post("/v1/recall", json={"user_id": "3", "query": "pizza"}), 422)
    assert "expected nothing, since this task has no query, got 'pizza'; leave it out" in detail
    assert "task: expected one of next_purchase" in problem(
        api.post("/v1/recall", json={"user_id": "3", "task": "gift"}), 404
    )
    assert "body field 'k': expected less than or equal to 10" in problem(
        api.post("/v1/recall", json={"user_id": "3", "k": 11}), 422
    )


def test_without_an_ad_hoc_worker_the_answer_says_so_at_once(api: TestClient, client: redis.Redis) -> None:
    response = api.post("/v1/recall", json={"user_id": "3"})
    assert problem(response, 503) == (
        "ad-hoc recall: expected an ad-hoc worker, got none; start one with `urm recall worker --ad-hoc`, "
        "or read stored results."
    )
    assert int(response.headers["retry-after"]) > 0
    assert client.exists(AD_HOC_REQUESTS) == 0
    assert 'urm_api_ad_hoc_total{status="503"} 1.0' in read_metrics(api)


def test_a_worker_that_is_silent_for_long_counts_as_gone(client: redis.Redis, recall_config: RecallConfig) -> None:
    seconds, _ = client.time()
    client.zadd(AD_HOC_WORKERS, {"dead": seconds - 1})
    assert push(client, AdHocRequest(user_id="3", task="new_item", k=1), recall_config) == -1
    AdHocQueue(client, "alive", recall_config).register()
    assert push(client, AdHocRequest(user_id="3", task="new_item", k=1), recall_config) == 1
    assert client.zrange(AD_HOC_WORKERS, 0, -1) == ["alive"]


def test_a_worker_in_a_long_batch_is_there_for_as_long_as_its_heartbeat(client: redis.Redis) -> None:
    send_heartbeat(client, "busy", "release")
    AdHocQueue(client, "busy", RecallConfig()).register()
    assert client.zscore(AD_HOC_WORKERS, "busy") == pytest.approx(client.zscore(WORKERS, "busy"), abs=1)


def test_deadline_is_504_and_a_full_queue_429(hasty: TestClient, client: redis.Redis) -> None:
    AdHocQueue(client, "busy", RecallConfig()).register()  # a worker that takes nothing
    with ThreadPoolExecutor(3) as pool:
        responses = list(pool.map(lambda _: hasty.post("/v1/recall", json={"user_id": "3"}), range(3)))
    late = [response for response in responses if response.status_code == 504]
    (full,) = (response for response in responses if response.status_code == 429)
    assert len(late) == 2
    assert "expected an answer within 0.3 s, got none; repeat the request later" in problem(late[0], 504)
    assert "expected fewer than 2 requests that wait, got as many" in problem(full, 429, "ad-hoc-queue-full")
    assert int(full.headers["retry-after"]) > 0


def test_requests_whose_deadline_has_passed_are_dropped_unprocessed(client: redis.Redis) -> None:
    short = RecallConfig(ad_hoc_deadline_seconds=0.05)
    queue = AdHocQueue(client, "a", RecallConfig())
    queue.register()
    late, good = AdHocRequest(user_id="late", task="t", k=1), AdHocRequest(user_id="good", task="t", k=1)
    assert push(client, late, short) == 1
    assert push(client, good, RecallConfig()) == 1
    client.rpush(AD_HOC_REQUESTS, "9999999999.0 {}", "nonsense")  # of another version
    time.sleep(0.06)
    assert queue.take(8, 0.1) == ([good], 3)
    assert queue.take(8, 0.01) == ([], 0)
    # Where nobody takes them, they do not stay.
    assert push(client, late, short) == 1
    assert 0 <= client.ttl(AD_HOC_REQUESTS) <= 1


def test_many_requests_are_answered_each_with_its_own(api: TestClient, ad_hoc: tuple[AdHocWorker, Publication]) -> None:
    def ask(number: int) -> dict[str, Any]:
        body = {"user_id": str(number % 12), "task": "new_item", "k": 1 + number % 5}
        return api.post("/v1/recall", json=body).json()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(60)))
    for number, answer in enumerate(answers):
        assert answer["user_id"] == str(number % 12)
        assert len(answer["items"]) == 1 + number % 5
        assert not {item["item_id"] for item in answer["items"]} & set(known_items(number % 12))


def test_a_request_that_breaks_the_model_harms_no_other(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    load_poisoned: Loader,
    recall_config: RecallConfig,
) -> None:
    add_history(client, recall_config, [make_event("5", POISON_ITEM)])
    AdHocQueue(client, "early", recall_config).register()  # so that requests may wait for the worker to come
    requests = [AdHocRequest(user_id=user, task="new_item", k=3) for user in ("4", "5", "6")]
    odd = AdHocRequest(user_id="7", task="gone", k=3)
    for request in (*requests, odd):
        assert push(client, request, RecallConfig(ad_hoc_deadline_seconds=60)) == 1
    start_worker("ad-hoc", load=load_poisoned, kind=AdHocWorker)
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    answers = [client.blpop([f"urm:adhoc:answer:{request.request_id}"], 30)[1] for request in (*requests, odd)]
    assert ["item_ids" in text for text in answers] == [True, False, True, False]
    assert AdHocRefusal.model_validate_json(answers[1]).status == 500
    assert "index out of range" not in answers[1]  # what is inside stays in the log
    assert AdHocRefusal.model_validate_json(answers[3]).status == 422


def test_a_sick_worker_hands_its_requests_back_and_leaves(
    client: redis.Redis, releases: tuple[Release, Release], start_worker: StartWorker, recall_config: RecallConfig
) -> None:
    class SickRelease(ServingRelease):
        def read_histories(self, user_ids: list[str]) -> dict[str, KnownHistory]:
            raise OSError("feature store: input/output error")

    def load(publication: Publication) -> ServingRelease:
        return SickRelease(**vars(load_release(publication, releases[0].settings, releases[0].config.release)))

    start_worker("sick", load=load, kind=AdHocWorker)
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    wait_until(lambda: client.zcard(AD_HOC_WORKERS))
    request = AdHocRequest(user_id="4", task="new_item", k=3)
    assert push(client, request, RecallConfig(ad_hoc_deadline_seconds=60)) == 1
    wait_until(lambda: not live_workers(client))
    assert client.zcard(AD_HOC_WORKERS) == 0 and client.llen(AD_HOC_REQUESTS) == 1
    start_worker("well", kind=AdHocWorker)
    assert "item_ids" in client.blpop([f"urm:adhoc:answer:{request.request_id}"], 30)[1]


def test_the_stream_is_served_whatever_is_asked_and_releases_switch_for_both(
    api: TestClient,
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    ad_hoc: tuple[AdHocWorker, Publication],
    recall_config: RecallConfig,
) -> None:
    start_worker("stream")
    stop, statuses = threading.Event(), set()

    def flood() -> None:
        while not stop.is_set():
            statuses.add(api.post("/v1/recall", json={"user_id": "3"}).status_code)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(flood) for _ in range(4)]
        try:
            feed(client, iter([make_event(str(n), event_id=f"e{n}") for n in range(12)]), recall_config)
            wait_until(lambda: client.xlen(STREAM) == 0)
            roll_out(WorkerFlip(client), releases[1].name, str(releases[1].bundle), timeout_seconds=60)
        finally:
            stop.set()
        for one in running:
            one.result(timeout=30)
    assert statuses == {200}
    assert api.post("/v1/recall", json={"user_id": "3"}).json()["release"] == releases[1].name
    metrics = ad_hoc[0].metrics
    assert metrics.registry.get_sample_value("urm_ad_hoc_requests_total", {"outcome": "answered"}) > 4
    assert metrics.registry.get_sample_value("urm_worker_events_total", {"outcome": "done"}) is None
    serving = {"kind": "ad_hoc", "release": releases[1].name}
    assert metrics.registry.get_sample_value("urm_worker_release", serving) == 1


def test_a_process_answers_the_command_line_and_leaves_on_sigterm(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig
) -> None:
    with pytest.raises(UnavailableError, match="ad-hoc recall: expected an ad-hoc worker, got none"):
        request_and_wait(client, AdHocRequest(user_id="3", task="new_item", k=3), recall_config)
    settings = releases[0].settings
    with runtime_process(settings, "worker", "--ad-hoc") as process:
        await_worker(client, process)
        roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=90)
        wait_until(lambda: client.zcard(AD_HOC_WORKERS))
        words = ("recall", "ask", "3", "--task", "new_item", "--guidance", WORDS, "--k", "3")
        done = run_python("-m", "components", *words, env=runtime_environment(settings), check=True)
        request = AdHocRequest(user_id="3", task="new_item", k=3, guidance=WORDS)
        result = request_and_wait(client, request, recall_config)
        assert all(f"item {item}" in done.stdout for item in result.item_ids)
        with pytest.raises(ConfigError, match="task 'gift': expected a task of the serving release"):
            request_and_wait(client, AdHocRequest(user_id="3", task="gift", k=3), recall_config)
        heading = f"User 3, new_item, “{WORDS}”: release {releases[0].name}"
        assert heading in " ".join(done.stdout.split())  # it wraps in a narrow terminal
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert live_workers(client) == set() and client.zcard(AD_HOC_WORKERS) == 0
