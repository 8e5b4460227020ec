"""Erasure of a user: nothing of theirs is left in Redis, and nothing of anybody else's is gone."""

import json
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from components.cli import app as cli
from components.config import RecallConfig
from components.recall.operate.intake import feed
from components.recall.state.scripts import CONTROL, DEAD_STREAM, STREAM
from components.recall.worker.stream import RecallWorker
from components.release.publication import Publication
from components.settings import get_settings
from tests.worlds.recall import Release, make_event, wait_until

USER, OTHERS = "forget [me]*", ("forget [me]*:1", "forget [me]", "1")


def dump(client: redis.Redis) -> dict[str, Any]:
    """Names and contents of all keys about users."""
    found: dict[str, Any] = {}
    for key in client.scan_iter("urm:*"):
        kind = client.type(key)
        if kind == "hash":
            found[key] = client.hgetall(key)
        elif kind == "stream":
            found[key] = client.xrange(key)
        elif kind == "zset":
            found[key] = client.zrange(key, 0, -1)
        elif kind == "string":
            found[key] = client.get(key)
    return found


def test_nothing_of_a_user_is_left_and_nothing_of_others_is_gone(
    client: redis.Redis,
    promoted: tuple[RecallWorker, Publication],
    recall_config: RecallConfig,
    releases: tuple[Release, Release],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def send(name: str) -> None:
        feed(client, iter([make_event(user, event_id=name, query="milk") for user in (USER, *OTHERS)]), recall_config)

    send("done")
    wait_until(lambda: client.xlen(STREAM) == 0)
    promoted[0].stop()
    wait_until(lambda: not client.exists(f"urm:worker:{promoted[0].name}"))
    send("waiting")
    for user in (USER, *OTHERS):
        letter = {
            "event": make_event(user, event_id="dead").model_dump_json(),
            "reason": "x",
            "deliveries": "1",
            "at": "1",
        }
        client.xadd(DEAD_STREAM, letter)  # type: ignore[arg-type]
    client.set(CONTROL, USER)
    before = dump(client)
    monkeypatch.setenv("URM_REDIS_URL", releases[0].settings.redis_url)
    get_settings.cache_clear()
    output = CliRunner().invoke(cli.app, ["recall", "forget", USER]).output
    get_settings.cache_clear()
    assert output == ("deleted: 1 waiting events, 1 dead letters, 1 histories, 2 marks of events, 3 results\n")
    after = dump(client)
    assert not [key for key, content in after.items() if f'{USER}"' in json.dumps([key, content, 0]).replace("\\", "")]
    mine = [key for key in before if key not in after]
    assert len(mine) == 1 + 2 + 2 + 3 + 1 and all(USER in key or key == CONTROL for key in mine)
    for key, content in before.items():
        if key not in mine and key not in (STREAM, DEAD_STREAM):
            assert after[key] == content
    assert (client.xlen(STREAM), client.xlen(DEAD_STREAM)) == (3, 3)
