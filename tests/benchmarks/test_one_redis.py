import json
from collections import Counter

import pytest

from benchmarks import one_redis
from benchmarks.lines import read_lines
from benchmarks.one_redis import plan_events, show
from benchmarks.redis_load import Recorder, open_server, play
from components.redis_client import open_redis

SMALL = ("--users", "40", "--events-per-user", "3", "--reads", "64", "--seconds", "0.2", "--set", "recall.k=10")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The output of a small run of all phases, on a real Redis."""
    output = tmp_path_factory.mktemp("one_redis") / "figures.jsonl"
    one_redis.main([*SMALL, "--output", str(output)])
    return output


def test_every_operation_is_charged_to_redis(measured):
    _, line = read_lines(measured)
    costs = line["costs"]
    counts = {name: cost["operations"] for name, cost in costs.items()}
    assert (line["tasks"], line["k"], line["events"]) == (9, 10, 120)
    assert [counts[name] for name in ("fill", "accept", "accept_list")] == [40, 120, 12]
    assert counts["claim"] == 132  # all that was accepted
    assert counts["commit"] == counts["history"] < 132  # events of a user share an inference
    assert counts["read"] == counts["read_shared"] == 64
    assert all(cost["cpu_us"] > 0 for cost in costs.values())
    assert costs["commit"]["file_bytes"] > costs["accept"]["file_bytes"] > costs["read"]["file_bytes"] == 0
    assert line["rewrite"]["file_before"] > line["rewrite"]["file_after"] > line["snapshot"]["file"] / 2 > 0
    assert all(load["latency_ms"]["p99"] > 0 < load["redis_ms"]["p99"] for load in line["reads"].values())


def test_bytes_follow_the_content(measured):
    no_users, users = read_lines(measured)
    by_length = {int(length): bytes_ for length, bytes_ in no_users["bytes"].items()}
    assert list(by_length) == [1, 16, 64, 200]
    histories = [bytes_["history"] for bytes_ in by_length.values()]
    assert histories == sorted(histories) and histories[-1] > 200 * 150  # an event is a JSON document and its id
    assert by_length[1]["results"] > 9 * 10 * 20
    assert users["bytes_per_user"] > 0.8 * by_length[1]["results"]  # these of few users come with Redis' buffers
    assert by_length[1]["mark"] > by_length[1]["mark_while_it_waits"]  # it names batch, release and revision by then


def test_lines_that_are_there_are_not_measured_again(measured, capsys):
    before = measured.read_text()
    one_redis.main([*SMALL, "--output", str(measured)])
    assert measured.read_text() == before
    assert "| 40 |" in capsys.readouterr().out


def test_what_is_recorded_is_what_redis_would_have_got(tmp_path):
    with open_server(tmp_path) as url, open_redis(url) as client:
        recorder = Recorder(client)
        script = recorder.register_script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
        client.script_load(script.script)
        with recorder.pipeline(transaction=False) as pipe:
            script(keys=["count"], args=[3], client=pipe)
            pipe.get("nothing")
            assert pipe.execute() == [1, 1]
        assert client.get("count") is None
        played = play(url, recorder.calls * 2)
        assert client.get("count") == "6"
    assert played.answers == Counter({"list": 2, "3": 1, "6": 1, "NoneType": 2})
    assert len(played.latency_ms) == len(played.redis_ms) == 2
    assert min(played.redis_ms) > 0


def test_an_unexpected_answer_ends_the_benchmark():
    with pytest.raises(RuntimeError, match=r"expected 9 2 times, got \{'9': 1, '-1': 1\}"):
        one_redis._require(Counter({"9": 1, "-1": 1}), "9", 2)


def test_the_plan_adds_up_what_an_event_costs():
    microseconds = {"accept": 60, "claim": 10, "history": 8, "commit": 112, "read": 5}
    costs = {name: {"cpu_us": cost} for name, cost in microseconds.items()}
    assert plan_events(costs, per_inference=1, reads_per_event=2, busy=0.6) == pytest.approx(600_000 / 200)
    assert plan_events(costs, per_inference=4, reads_per_event=0, busy=1) == pytest.approx(1_000_000 / 100)
    assert show([{"users": 0}]) == ""


def test_more_users_than_memory_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        one_redis.main(["--users", "1000000000", "--output", str(tmp_path / "x.jsonl")])
    assert "expected twice 40000.0 GB of free memory for 1,000,000,000" in capsys.readouterr().err


def test_a_server_that_ends_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("REDIS_SERVER", "false")
    with pytest.raises(RuntimeError, match="false has ended with exit code 1"), open_server(tmp_path):
        pass


def test_the_output_is_one_json_document_per_line(measured):
    assert [json.loads(line)["users"] for line in measured.read_text().splitlines()] == [0, 40]
