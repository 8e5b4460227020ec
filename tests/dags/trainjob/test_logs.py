"""The log of a container, read piece by piece."""

from datetime import UTC, datetime

from dags.trainjob.logs import OVERLAP_SECONDS, Position, seconds_to_read, split_lines, split_new

T = "2026-11-28T10:00:0"
LOG = [f"{T}1.5Z one", f"{T}1.500000001Z two", f"{T}2Z three", f"{T}2Z four", f"{T}2.1Z "]


def test_pieces_make_the_whole_wherever_they_are_cut():
    for first in range(len(LOG) + 1):
        for second in range(first, len(LOG) + 1):
            position, texts = Position(), []
            for end in (first, second, len(LOG), len(LOG)):
                new, position = split_new(LOG[:end], position, "pod")
                texts += new
            assert texts == ["one", "two", "three", "four", ""], (first, second)


def test_a_line_that_was_written_late_is_not_lost():
    _, position = split_new([f"{T}1Z out", f"{T}3Z out"], Position(), "pod")
    late = [f"{T}1Z out", f"{T}3Z out", f"{T}2.999999Z err"]
    assert split_new(late, position, "pod")[0] == ["err"]


def test_after_a_rotation_the_timestamp_tells_what_is_new():
    _, position = split_new(LOG, Position(), "pod")
    assert split_new([f"{T}2.05Z old", f"{T}3Z new"], position, "pod") == (
        ["new"],
        Position("pod", f"{T}3.000000000", 1),
    )


def test_the_log_of_another_pod_begins_at_its_beginning():
    _, position = split_new(LOG, Position(), "pod")
    assert split_new([f"{T}0Z again"], position, "other")[0] == ["again"]
    assert seconds_to_read(position, "other", datetime.now(UTC)) is None


def test_what_the_kubelet_says_instead_of_a_log_is_no_line_of_it():
    said = ["unable to retrieve container logs for containerd://3f"]
    assert split_new(said, Position("pod", f"{T}1.000000000", 1), "pod") == ([], Position("pod", f"{T}1.000000000", 1))


def test_a_node_may_have_another_time_zone():
    local = ["2026-11-28T12:00:01.5+02:00 one", "2026-11-28T04:30:02.25-05:30 two"]
    new, position = split_new(local, Position(), "pod")
    assert (new, position.time) == (["one", "two"], f"{T}2.250000000")
    assert seconds_to_read(position, "pod", datetime(2026, 11, 28, 10, 0, 2, tzinfo=UTC)) == OVERLAP_SECONDS
    assert split_new([*local, "2026-11-28T12:00:03+02:00 three"], position, "pod")[0] == ["three"]


def test_a_line_keeps_what_only_python_takes_for_its_end():
    assert split_lines(f"{T}1Z 10%\r20%\u2028on\n{T}2Z\n") == [f"{T}1Z 10%\r20%\u2028on", f"{T}2Z"]
    assert split_lines("") == []


def test_the_next_request_reaches_behind_the_last_line():
    position = Position("pod", f"{T}1.900000000", 1)
    now = datetime(2026, 11, 28, 10, 0, 31, 500000, tzinfo=UTC)
    assert seconds_to_read(position, "pod", now) == 30 + OVERLAP_SECONDS
    assert seconds_to_read(position, "pod", datetime(2026, 11, 28, 9, tzinfo=UTC)) == OVERLAP_SECONDS
