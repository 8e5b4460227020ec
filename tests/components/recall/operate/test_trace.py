"""What `urm recall trace` says of an event at every place it can be."""

import io
import time
from collections.abc import Sequence

import pytest
import redis
from fastapi.testclient import TestClient
from rich.console import Console
from typer.testing import CliRunner

from components.cli import app as cli
from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import DataError
from components.recall.operate.deadletters import drop, list_letters, replay
from components.recall.operate.intake import feed
from components.recall.operate.trace import Trace, describe_trace, read_tasks, trace_event
from components.recall.serving.engine import Ranking, ServingRelease, load_release
from components.recall.state.scripts import MARK_TTL_SECONDS, STREAM, accepted_key
from components.recall.state.stream import EventStream
from components.recall.worker.stream import RecallWorker
from components.release.publication import Publication
from components.settings import get_settings
from components.urm.data.request import RecallRequest
from tests.worlds.recall import Release, StartWorker, finish, make_event, serve_release, wait_until

TASKS = ("next_purchase", "new_item", "text_query")


def trace(client: redis.Redis, event_id: str, user_id: str = "3") -> Trace:
    return trace_event(client, event_id, TASKS, user_id)


def wait_for_workers(client: redis.Redis) -> None:
    wait_until(lambda: client.xlen(STREAM) == 0)


def test_event_is_followed_through_the_stream(client: redis.Redis, recall_config: RecallConfig) -> None:
    before = time.time()
    feed(client, iter([make_event(event_id="e1")]), recall_config)
    waiting = trace(client, "e1")
    assert waiting.user_id == "3"
    entry = client.hget(accepted_key("3", "e1"), "entry")
    assert waiting.accepted.endswith(f"Z, entry {entry}")
    assert abs(int(str(entry).split("-")[0]) / 1000 - before) < 60
    assert waiting.state == "waiting in the stream; no worker has taken it yet"
    assert waiting.history == "not in the user's live history"
    assert {seen.relation for seen in waiting.results} == {"none stored"}

    stream = EventStream(client, "worker-a", recall_config)
    stream.ensure_group()
    assert trace(client, "e1").state.startswith("waiting")
    entries = stream.read(10, 10)
    assert trace(client, "e1").state.startswith("pending at worker worker-a, deliveries: 1, the last ")
    time.sleep(recall_config.claim_idle_seconds)
    other = EventStream(client, "worker-b", recall_config)
    other.begin(other.claim_stale(10))
    assert trace(client, "e1").state.startswith("pending at worker worker-b, deliveries: 2, the last ")
    finish(client, recall_config, entries)
    assert trace(client, "e1").state.startswith("done at 20")
    client.hdel(accepted_key("3", "e1"), "done")
    assert trace(client, "e1").state.startswith("gone from the stream without a result")


def test_result_is_visible_until_that_of_a_later_event_supersedes_it(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig
) -> None:
    worker, publication = promoted
    feed(client, iter([make_event(event_id="asks", item_id=None, query="shelf 3", minutes=60)]), recall_config)
    wait_for_workers(client)
    first = trace(client, "asks")
    assert f"in batch {worker.name}/1 with release {publication.release}" in first.state
    assert first.history == "in the user's live history"
    assert [seen.relation for seen in first.results] == ["visible: it is the newest event of this result"] * 3
    assert {(seen.order, seen.revision) for seen in first.results} == {(publication.order, 1)}

    feed(client, iter([make_event(event_id="buys", minutes=70)]), recall_config)
    wait_for_workers(client)
    purchase, new, query = trace(client, "asks").results
    assert purchase.relation == new.relation == query.relation  # the search is answered anew, with the purchase known
    assert purchase.relation == "superseded: the result of event buys of 2017-12-17T13:10:00.000Z knows it, too"
    assert purchase.revision == 2
    assert trace(client, "buys").results[2].relation == "visible: it is the newest event of this result"

    feed(client, iter([make_event(event_id="late", minutes=65)]), recall_config)
    wait_for_workers(client)
    assert trace(client, "late").results[0].relation.startswith("superseded: the result of event buys")


def test_every_answer_of_the_api_can_be_traced(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig, api: TestClient
) -> None:
    feed(client, iter([make_event(str(user), event_id=f"event of {user}") for user in range(5)]), recall_config)
    wait_for_workers(client)
    for user in range(5):
        answer = api.get(f"/v1/users/{user}/recall").json()
        found = trace(client, answer["event_id"], str(user))
        assert found.user_id == str(user)
        assert found.results[0].result is not None
        assert found.results[0].result.computed_at.isoformat() == answer["computed_at"].replace("Z", "+00:00")
        client.delete(accepted_key(str(user), answer["event_id"]))  # as after a day
        old = trace(client, answer["event_id"], str(user))
        assert old.accepted == "more than a day ago"
        assert old.state == "its mark has expired; a worker has taken it into the history"
        assert old.results[0].relation.startswith("visible")


def test_dead_letter_is_found_with_its_reason_and_again_after_its_replay(
    client: redis.Redis, releases: tuple[Release, Release], start_worker: StartWorker, recall_config: RecallConfig
) -> None:
    broken = True

    class BreakingRelease(ServingRelease):
        def recommend(self, requests: Sequence[RecallRequest], k: int) -> list[Ranking]:
            if broken and any(1050 in request.context.item_ids[:1] for request in requests):
                raise ValueError("no such row [17]")
            return super().recommend(requests, k)

    def load(publication: Publication) -> ServingRelease:
        release = load_release(publication, releases[0].settings, releases[0].config.release)
        return BreakingRelease(**vars(release))

    feed(client, iter([make_event(event_id="bad")]), recall_config)
    start_worker(load=load)
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    wait_until(lambda: list_letters(client))
    (letter,) = list_letters(client)
    assert trace(client, "bad").state.startswith(f"dead letter {letter.letter_id} since 20")
    assert trace(client, "bad").state.endswith("after 3 tries: ValueError: no such row [17]")
    assert trace(client, "bad").history == "not in the user's live history"

    client.delete(accepted_key("3", "bad"))  # letters outlive marks
    assert trace(client, "bad").user_id == "3"
    assert trace(client, "bad").state.endswith("no such row [17]")

    broken = False
    assert replay(client, [letter.letter_id], recall_config) == 1
    wait_for_workers(client)
    assert trace(client, "bad").state.startswith("done at")
    assert trace(client, "bad").results[0].relation.startswith("visible")
    assert 0 < int(str(client.ttl(accepted_key("3", "bad")))) <= MARK_TTL_SECONDS


def test_dropped_letter_leaves_its_mark_and_a_letter_that_is_no_event_can_be_replayed(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    stream = EventStream(client, "a", recall_config)
    stream.ensure_group()
    feed(client, iter([make_event(event_id="e1")]), recall_config)
    (entry,) = stream.read(10, 10)
    stream.give_up(entry, "why")
    drop(client, [])
    assert trace(client, "e1").state.endswith("its dead letter has been dropped")
    client.xadd(STREAM, {"event": "{"})
    assert stream.read(10, 10) == []
    assert replay(client, [], recall_config) == 1
    assert client.xlen(STREAM) == 1


def test_event_that_nobody_knows_is_one_sentence(client: redis.Redis) -> None:
    with pytest.raises(
        DataError, match=r"event 'nope' of user '3': expected an event accepted within a day, .* got none"
    ):
        trace(client, "nope")


def test_note_makes_no_mark_that_would_never_expire(client: redis.Redis, recall_config: RecallConfig) -> None:
    stream = EventStream(client, "a", recall_config)
    stream.ensure_group()
    feed(client, iter([make_event(event_id="e1"), make_event(event_id="e2")]), recall_config)
    client.delete(accepted_key("3", "e1"))
    client.set(accepted_key("3", "e2"), "1")  # as versions before the lineage wrote it
    finish(client, recall_config, stream.read(10, 10))
    assert client.exists(accepted_key("3", "e1")) == 0
    assert client.get(accepted_key("3", "e2")) == "1"
    assert client.xlen(STREAM) == 0


def test_lineage_costs_no_more_than_the_operations_page_says(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig
) -> None:
    events = [make_event(f"user-{number}", event_id=f"8f14e45f-ceea-467f-{number:017}") for number in range(20)]
    feed(client, iter(events), recall_config)
    wait_for_workers(client)
    sizes = [int(str(client.memory_usage(accepted_key(event.user_id, event.event_id)))) for event in events]
    assert max(sizes) <= 350


def test_command_prints_the_trace(
    client: redis.Redis,
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("URM_REDIS_URL", releases[0].settings.redis_url)
    monkeypatch.setenv("COLUMNS", "200")
    get_settings.cache_clear()
    feed(client, iter([make_event(event_id="e1")]), recall_config)
    output = CliRunner().invoke(cli.app, ["recall", "trace", "e1", "--user", "3"]).output
    assert "event     e1 of user 3" in output
    assert "state     waiting in the stream" in output
    assert "results   unknown: no release is serving" in output
    serve_release(client, releases[0])
    assert read_tasks(client) == TASKS
    output = CliRunner().invoke(cli.app, ["recall", "trace", "e1", "--user", "3"]).output
    assert "text_query" in output and "none stored" in output

    monkeypatch.setattr("sys.argv", ["urm", "recall", "trace", "nope", "--user", "3"])
    with pytest.raises(SystemExit) as caught:
        cli.run_app()
    assert caught.value.code == 2
    assert "event 'nope' of user '3': expected an event accepted within a day" in " ".join(
        capsys.readouterr().err.split()
    )
    get_settings.cache_clear()


def test_text_of_an_event_is_no_markup(client: redis.Redis, recall_config: RecallConfig) -> None:
    feed(client, iter([make_event("[bold]3", event_id="[red]e")]), recall_config)
    page = io.StringIO()
    Console(width=120, file=page).print(describe_trace(trace(client, "[red]e", "[bold]3")))
    assert "event     [red]e of user [bold]3" in page.getvalue()
