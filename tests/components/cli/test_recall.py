import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import structlog
import uvicorn
from typer.testing import CliRunner

from components.cli import app as cli
from components.cli import recall as commands
from components.config import RecallConfig
from components.exceptions import ConfigError, DataError
from components.recall.operate.deadletters import list_letters
from components.recall.operate.intake import feed
from components.recall.state.scripts import STREAM
from components.recall.state.store import Commit, RecentEvents, UserStore
from components.recall.state.stream import EventStream
from components.settings import get_settings
from tests.components.recall.state.test_store import make_result
from tests.worlds.recall import Release, add_entries, free_address, make_event, serve_release
from tests.worlds.servers import free_port


@pytest.fixture(autouse=True)
def environment(
    monkeypatch: pytest.MonkeyPatch, releases: tuple[Release, Release], client: redis.Redis
) -> Iterator[None]:
    monkeypatch.setenv("URM_HOME", str(releases[0].settings.home))
    monkeypatch.setenv("URM_REDIS_URL", releases[0].settings.redis_url)
    monkeypatch.setenv("COLUMNS", "200")
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()
    structlog.reset_defaults()


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["recall", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_events_of_a_file_are_fed_once(client: redis.Redis, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(make_event(event_id=f"e{n}").model_dump_json() for n in range(3)))
    assert invoke("events", str(path), "--limit", "2") == "2 accepted, 0 accepted before, 0 refused\n"
    assert invoke("events", str(path)) == "1 accepted, 2 accepted before, 0 refused\n"
    path.write_text(make_event(event_id="e0", item_id=7).model_dump_json())
    result = CliRunner().invoke(cli.app, ["recall", "events", str(path)])
    assert result.stdout == "0 accepted, 0 accepted before, 1 refused\n"
    assert "event 'e0': expected an id of its own, or the content that was accepted under it" in result.stderr
    assert client.xlen(STREAM) == 3


def test_a_bad_line_is_named_and_loses_no_other(client: redis.Redis, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [make_event(event_id=f"e{n}").model_dump_json() for n in range(1000)]
    lines[700] = "{"
    path.write_text("\n".join(lines))
    for expected in ("999 accepted, 0 accepted before, 1 refused", "0 accepted, 999 accepted before, 1 refused"):
        result = CliRunner().invoke(cli.app, ["recall", "events", str(path)])
        assert result.stdout == expected + "\n"
        assert "events.jsonl, line 701: expected JSON: " in result.stderr
        assert isinstance(result.exception, DataError) and result.exception.exit_code == 2
        assert "expected an event in every row, got 1 without; the others are fed" in str(result.exception)
    assert client.xlen(STREAM) == 999


def test_an_init_container_has_nothing_to_fetch_before_the_first_promotion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("fetch").startswith("no release to fetch: URM_RELEASE is empty until the first promotion")
    monkeypatch.setenv("URM_RELEASE", "urm-x")
    get_settings.cache_clear()
    with pytest.raises(ConfigError, match="release urm-x, URM_RELEASE_BUNDLE: expected the URI of its bundle, got ''"):
        invoke("fetch")


def test_an_api_that_cannot_start_says_why(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("log_as_json", "collect_rarely"):  # they are for the whole process
        monkeypatch.setattr(commands, name, lambda: None)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigError, match=r"maxmemory-policy: expected noeviction, .*, got allkeys-lru"):
            invoke("serve", "--port", str(free_port()))
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_workers_need_something_to_run() -> None:
    assert "got --instances 0 without --ad-hoc" in invoke("workers", "--instances", "0")


def test_dead_letters_are_listed_replayed_and_dropped(client: redis.Redis, recall_config: RecallConfig) -> None:
    stream = EventStream(client, "a", recall_config)
    stream.ensure_group()
    feed(client, (make_event(event_id=f"e{number}") for number in range(2)), recall_config)
    for entry in stream.read(10, 10):
        stream.give_up(entry, "too odd [/bold] \x1b[2J")
    printed = invoke("dead-letters", "list")
    assert "too odd" in printed and "[/bold]" in printed and "\x1b" not in printed
    assert invoke("dead-letters", "replay", list_letters(client)[0].letter_id) == "1 replayed\n"
    assert "expected ids or --all" in invoke("dead-letters", "drop")
    assert invoke("dead-letters", "drop", "--all") == "1 dropped\n"
    assert invoke("dead-letters", "list") == "no dead letters\n"
    assert client.xlen(STREAM) == 1


def test_a_narrow_terminal_cuts_nothing_of_the_letters_and_says_how_many_are_left(
    client: redis.Redis, recall_config: RecallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = EventStream(client, "a", recall_config)
    stream.ensure_group()
    feed(client, (make_event(event_id=f"event-of-a-long-name-{number}") for number in range(3)), recall_config)
    for entry in stream.read(10, 10):
        stream.give_up(entry, "too odd")
    result = CliRunner().invoke(cli.app, ["recall", "dead-letters", "list", "--limit", "2"])
    assert "…" not in result.stdout
    assert result.stderr == "1 more; see them with --limit 3\n"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    events = "".join(row[-1] for row in cells)
    assert "event-of-a-long-name-0" in events and "event-of-a-long-name-1" in events
    assert list_letters(client)[0].letter_id in "".join(row[0] for row in cells)


def test_show_prints_recall_beside_events(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig
) -> None:
    serve_release(client, releases[0])
    result = make_result(1).model_copy(update={"item_ids": [1001, 1002], "scores": [2.0, 1.0]})
    entries = add_entries(client, [make_event(item_id=1050, query="pizza")])
    commits = [Commit(entries, RecentEvents([entries[0].event]), {"next_purchase": result})]
    assert UserStore(client, recall_config).commit(commits, release="r", order=1, batch="b") == [1]
    output = invoke("show", "3")
    assert re.search(r"1001 +│ item 1001 .* purchase 1050 item 1050 “pizza”", output) and "item 1002" in output


def test_nothing_to_show_is_one_sentence(client: redis.Redis, releases: tuple[Release, Release]) -> None:
    with pytest.raises(Exception, match="recall: expected a serving release, got none yet"):
        invoke("show", "3")
    serve_release(client, releases[0])
    with pytest.raises(Exception, match="user '3': expected a stored result for task 'next_purchase', got none"):
        invoke("show", "3")
    with pytest.raises(Exception, match="task: expected one of next_purchase, new_item, text_query, got 'gift'"):
        invoke("show", "3", "--task", "gift")


def test_redis_that_is_away_is_one_sentence_and_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("URM_REDIS_URL", f"redis://:secret@{free_address()}/0")
    get_settings.cache_clear()
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps({"event_id": "e", "user_id": "3", "item_id": 1}))
    for arguments in (["dead-letters", "list"], ["show", "3"], ["events", str(path)]):
        monkeypatch.setattr("sys.argv", ["urm", "recall", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.run_app()
        assert caught.value.code == 3
        message = capsys.readouterr().err
        assert "Redis at redis://127.0.0.1:" in message and "expected an answer" in message
        assert "Traceback" not in message and "secret" not in message


def test_redis_that_is_full_is_one_sentence_and_exit_code_3(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(make_event(event_id="e", query="arsenic").model_dump_json())
    monkeypatch.setattr("sys.argv", ["urm", "recall", "events", str(path)])
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.run_app()
    finally:
        client.config_set("maxmemory", 0)
    assert caught.value.code == 3
    message = capsys.readouterr().err
    assert "expected room for a write, got none below its maxmemory" in message
    assert "Traceback" not in message and "arsenic" not in message


def test_tokens_are_made_listed_and_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "setting URM_API_TOKENS_FILE: expected the path" in invoke_failing("token", "list")
    monkeypatch.setenv("URM_API_TOKENS_FILE", str(tmp_path / "tokens.json"))
    get_settings.cache_clear()
    secret = invoke("token", "create", "shop", "--scope", "read", "--scope", "write").strip()
    assert secret.startswith("urm_")
    assert invoke("token", "list").startswith("shop\tread,write\t20")
    sentence = invoke_failing("token", "create", "b", "--scope", "root")
    assert "option --scope: expected read or write or ask, got root" in sentence
    invoke("token", "revoke", "shop")
    assert invoke("token", "list") == ""


def test_the_address_of_a_caller_is_not_what_a_header_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a limit of its own; uvicorn would trust the header from this machine."""
    for name in ("log_as_json", "collect_rarely"):
        monkeypatch.setattr(commands, name, lambda: None)
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(uvicorn, "run", lambda *_, **options: asked.append(options))
    invoke("serve", "--port", str(free_port()))
    assert asked[0]["proxy_headers"] is False


def test_serving_spares_the_garbage_collector_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[tuple[int, int]] = []
    usual = gc.get_threshold()
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: walked.append((len(gc.get_objects()), gc.get_threshold()[0])))
    monkeypatch.setattr(commands, "log_as_json", lambda: None)
    try:
        invoke("serve")
    finally:
        gc.unfreeze()
        gc.set_threshold(*usual)
    assert walked[0][0] < len(gc.get_objects()) / 50
    assert walked[0][1] > 10 * usual[0]


def test_an_address_that_others_reach_wants_tokens() -> None:
    sentence = invoke_failing("serve", "--host", "192.0.2.1")
    assert "recall API on 192.0.2.1: expected a token file in URM_API_TOKENS_FILE" in sentence


def invoke_failing(*arguments: str) -> str:
    """The sentence of the error that a command ends with."""
    with pytest.raises(ConfigError) as caught:
        invoke(*arguments)
    return str(caught.value)
