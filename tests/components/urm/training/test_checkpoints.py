"""Which checkpoint counts, and what is in the store, whatever happens to a disk, a store or a process."""

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from components.exceptions import UnavailableError
from components.urm.training.checkpoints import COMPLETE, Checkpoints, find_damage
from tests.worlds.servers import free_port


def write(folder: Path) -> None:
    (folder / "shards").mkdir()
    (folder / "shards" / "weights").write_text(f"weights of {folder.name}")
    (folder / "state").write_text(f"state of {folder.name}")


def content(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def whole(*steps: int) -> set[str]:
    return {f"checkpoint-{step}/{name}" for step in steps for name in ("shards/weights", "state", COMPLETE)}


@pytest.fixture(params=["", "store"])
def make(request, tmp_path):
    """Checkpoints of an attempt: on a disk that lasts, or on one of its own with a store."""
    numbers = iter(range(10))
    store = f"local://{tmp_path}/{request.param}" if request.param else ""
    folder = tmp_path / (request.param or "disk")

    def make() -> Checkpoints:
        return Checkpoints(tmp_path / f"disk-{next(numbers)}" if store else folder, store)

    make.lasting = folder
    return make


def save(checkpoints: Checkpoints, step: int, best: int | None = None) -> bool:
    checkpoints.begin(step)
    saved = checkpoints.save(step, best, 1.5 * step, write)
    checkpoints.wait()
    return saved


def test_the_best_and_the_newest_are_kept_and_found_again(make):
    first = make()
    assert first.restore() is None
    for step, best in ((2, 2), (3, 2), (4, 2)):
        assert save(first, step, best)
    assert content(make.lasting) == whole(2, 4)
    second = make()
    assert second.restore() == 4
    assert json.loads((second.path(4) / COMPLETE).read_text())["seconds"] == 6.0
    assert second.fetch(2)
    assert (second.path(2) / "shards" / "weights").read_text() == "weights of checkpoint-2"
    save(second, 6, 6)
    assert content(make.lasting) == whole(6)


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("state", "stat"),
        ("shards/weights", "other words, as many"),
        ("state", None),
        (COMPLETE, None),
        (COMPLETE, '{"seconds": 1'),
        (COMPLETE, "[]"),
    ],
)
def test_a_damaged_one_is_skipped_with_a_warning(make, name, damaged):
    first = make()
    save(first, 2)
    save(first, 4, 2)
    path = make.lasting / "checkpoint-4" / name
    path.unlink() if damaged is None else path.write_text(damaged)
    second = make()
    with capture_logs() as logs:
        assert second.restore() == 2
    assert [(entry["log_level"], entry["checkpoint"]) for entry in logs] == [("warning", "checkpoint-4")]
    assert Path(name).name in logs[0]["damage"]
    assert save(second, 4, 2)  # the step comes again
    assert make().restore() == 4


def test_one_that_the_disk_cannot_read_is_skipped_too(tmp_path):
    save(Checkpoints(tmp_path), 2)
    state = tmp_path / "checkpoint-2" / "state"
    state.unlink()
    state.symlink_to("/proc/self/mem")  # opens, but its first page cannot be read
    with capture_logs() as logs:
        assert Checkpoints(tmp_path).restore() is None
    assert logs[0]["damage"] == "checkpoint-2: Input/output error"


@pytest.mark.parametrize("left", [None, "stat"])
def test_one_that_is_damaged_on_this_disk_alone_comes_from_the_store(tmp_path, left):
    """As where a process was killed while it removed the folder."""
    first = Checkpoints(tmp_path / "disk", f"local://{tmp_path}/store")
    save(first, 2)
    (first.path(2) / "state").unlink()
    if left is not None:
        (first.path(2) / "state").write_text(left)
    again = Checkpoints(tmp_path / "disk", f"local://{tmp_path}/store")
    assert again.restore() == 2
    assert content(tmp_path / "disk") == whole(2) and not find_damage(again.path(2))


def test_a_full_disk_leaves_the_one_before(make):
    checkpoints = make()
    save(checkpoints, 2)

    def fill(folder: Path) -> None:
        write(folder)
        (folder / "more").symlink_to("/dev/full")
        (folder / "more").write_text("x")

    with capture_logs() as logs:
        checkpoints.begin(4)
        assert not checkpoints.save(4, 4, 1.0, fill)
    assert "No space left on device" in logs[0]["error"]
    checkpoints.wait()
    assert make().restore() == 2
    assert save(checkpoints, 5)
    assert content(make.lasting) == whole(5)


def test_a_store_that_was_away_gets_what_it_missed(tmp_path):
    store = tmp_path / "store"
    store.write_text("no folder")
    checkpoints = Checkpoints(tmp_path / "disk", f"local://{store}")
    with capture_logs() as logs:
        assert save(checkpoints, 2)
        assert save(checkpoints, 4, 2)
    assert [entry["log_level"] for entry in logs] == ["warning", "warning"]
    store.unlink()
    save(checkpoints, 6, 2)
    assert content(store) == whole(2, 6)


def test_a_store_that_is_away_at_the_start_is_no_reason_to_start_anew(tmp_path):
    with pytest.raises(UnavailableError, match=r"checkpoints http://.*: expected an answer, got .*; start the stage"):
        Checkpoints(tmp_path, f"http://127.0.0.1:{free_port()}/run").restore()


def test_an_upload_that_breaks_off_does_not_count(tmp_path):
    store = tmp_path / "store"
    save(Checkpoints(tmp_path / "first", f"local://{store}"), 2)
    (store / "checkpoint-4" / "state").mkdir(parents=True)  # where a file must go
    with capture_logs() as logs:
        second = Checkpoints(tmp_path / "second", f"local://{store}")
        assert second.restore() == 2
        save(second, 4, 2)
    assert logs[-1]["event"].startswith("checkpoint cannot be copied")
    assert not (store / "checkpoint-4" / COMPLETE).exists()
    assert Checkpoints(tmp_path / "third", f"local://{store}").restore() == 2


def test_an_attempt_that_was_replaced_ends_and_writes_nothing(tmp_path):
    owner = ["first"]
    first = Checkpoints(tmp_path / "first", f"local://{tmp_path}/store", owns_store=lambda: owner == ["first"])
    save(first, 2)
    owner[:] = ["second"]
    assert first.save(4, 4, 1.0, write)
    with pytest.raises(UnavailableError, match="expected one attempt at a time, got another attempt that has taken"):
        first.begin(6)
    assert content(tmp_path / "store") == whole(2)


def test_the_interval_counts_from_the_last_one(tmp_path):
    assert not Checkpoints(tmp_path, minutes=10).is_due
    assert Checkpoints(tmp_path, minutes=1e-9).is_due
    assert find_damage(tmp_path).startswith(COMPLETE)
