"""Resume, several processes, early stopping and what is logged, on a tiny world; no test depends on the clock."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from structlog.testing import capture_logs
from transformers import TrainingArguments

from components.exceptions import StoppedError
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.steps import TrainingSteps
from components.urm.training.trainer import UrmTrainer
from tests.worlds.training import build_untrained, launch, run_training, write_world

FAR = 1e6  # seconds; a limit that no step reaches
URM = {"max_steps": 8, "eval_steps": 2, "max_seconds": FAR, "contexts_per_batch": 3, "text_loss_weight": 0.3}


class TwoGpus(TrainingArguments):
    """As where a process sees two."""

    def __post_init__(self):
        super().__post_init__()
        assert self.device is not None  # counted by now
        self._n_gpu = 2


class Killed(Exception):
    """Stands for the end of a process."""


def make_world(folder, tables, table_dir, config, **urm):
    folder.mkdir()
    changed = config.model_copy(update={"urm": config.urm.model_copy(update=URM | urm)})
    write_world(folder, tables, table_dir, changed)
    return folder


@pytest.fixture
def world(tmp_path, tables, table_dir, config):
    return make_world(tmp_path / "world", tables, table_dir, config)


def ignore(step, metrics):
    pass


def assert_equal(left, right, path="state"):
    """Same tensors bit for bit in nested dictionaries and lists."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for name in left:
            assert_equal(left[name], right[name], f"{path}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{path}[{number}]")
    else:
        assert left == right, path


def state(checkpoint):
    return {
        "weights": load_file(checkpoint / "model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(checkpoint / "scheduler.pt", weights_only=True),
    }


@pytest.mark.parametrize("fatal_step", [3, 5])
def test_a_training_broken_off_and_resumed_has_the_weights_of_an_unbroken_one(world, tmp_path, fatal_step):
    unbroken, whole = run_training(world, Checkpoints(tmp_path / "unbroken"), ignore)

    def die(step, metrics):
        if step >= fatal_step:
            raise Killed

    with pytest.raises(Killed):
        run_training(world, Checkpoints(tmp_path / "broken"), die)
    left = sorted(path.name for path in (tmp_path / "broken").glob("checkpoint-*"))
    assert left[-1] == f"checkpoint-{fatal_step - 1}"
    seen = []
    resumed, summary = run_training(world, Checkpoints(tmp_path / "broken"), lambda step, metrics: seen.append(step))

    assert min(seen) > fatal_step - 1  # it went on, and did not start again
    assert (summary.steps, summary.best_step, summary.best_recall) == (8, whole.best_step, whole.best_recall)
    assert_equal(resumed.state_dict(), unbroken.state_dict())
    assert_equal(state(tmp_path / "broken" / "checkpoint-8"), state(tmp_path / "unbroken" / "checkpoint-8"))


def test_a_process_trains_on_one_gpu_though_it_sees_two(world, tmp_path, monkeypatch):
    """Else the Trainer would draw two steps at a time, of which one is trained, and split it over both."""

    alone, _ = run_training(world, Checkpoints(tmp_path / "alone"), ignore)
    monkeypatch.setattr("components.urm.training.train.TrainingArguments", TwoGpus)
    beside, _ = run_training(world, Checkpoints(tmp_path / "beside"), ignore)
    assert_equal(beside.state_dict(), alone.state_dict())


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_training_goes_on_elsewhere_from_the_store_as_if_it_had_never_ended(world, tmp_path, end):
    """Whether it is killed or gets SIGTERM between two evaluations and two points of the curves."""
    curves = {"unbroken": {}, "broken": {}}

    def note(name, step, metrics):
        for metric in {"loss", "recall_loss", "text_loss", "grad_norm", "validation_recall"} & metrics.keys():
            curves[name][metric, step] = metrics[metric]

    unbroken, whole = run_training(world, Checkpoints(tmp_path / "unbroken"), partial(note, "unbroken"))

    def die(step, metrics):
        note("broken", step, metrics)
        if end == "killed" and step == 6:
            raise Killed
        if end == "stopped" and "validation_recall" in metrics and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    store = f"local://{tmp_path}/store"
    minutes = 1e-9 if end == "killed" else math.inf  # after every step
    first = Checkpoints(tmp_path / "first", store, minutes)
    error, message = (Killed, None) if end == "killed" else (StoppedError, "got SIGTERM at step 5; run the stage again")
    with pytest.raises(error, match=message):
        run_training(world, first, die)
    first.wait()
    left = {path.name for path in (tmp_path / "store").iterdir()}
    assert "checkpoint-5" in left
    assert len(left) == 2  # the best and the newest
    second = Checkpoints(tmp_path / "second", store)
    resumed, summary = run_training(world, second, partial(note, "broken"))

    assert (summary.steps, summary.best_step, summary.best_recall) == (8, whole.best_step, whole.best_recall)
    assert_equal(resumed.state_dict(), unbroken.state_dict())
    assert_equal(state(tmp_path / "second" / "checkpoint-8"), state(tmp_path / "unbroken" / "checkpoint-8"))
    assert curves["broken"] == curves["unbroken"]


def test_a_checkpoint_that_cannot_be_written_is_no_best_one_and_ends_nothing(world, tmp_path, monkeypatch):
    """The disk is full at the first evaluation, and not at the others."""
    save = UrmTrainer._save_optimizer_and_scheduler

    def fill(self, folder):
        save(self, folder)
        if self.state.global_step == 2:
            (Path(folder) / "more").symlink_to("/dev/full")
            (Path(folder) / "more").write_text("x")

    monkeypatch.setattr(UrmTrainer, "_save_optimizer_and_scheduler", fill)
    with capture_logs() as logs:
        _, summary = run_training(world, Checkpoints(tmp_path / "scratch"), ignore)
    assert [entry["step"] for entry in logs if entry["log_level"] == "warning"] == [2]
    assert summary.steps == 8
    assert summary.best_step > 2
    assert not (tmp_path / "scratch" / "checkpoint-2").exists()


def test_the_weights_kept_are_those_of_the_best_evaluation(world, tmp_path):
    recalls = {}

    def note(step, metrics):
        if "validation_recall" in metrics:
            recalls[step] = metrics["validation_recall"]

    model, summary = run_training(world, Checkpoints(tmp_path / "scratch"), note)
    assert sorted(recalls) == [2, 4, 6, 8]
    assert summary.best_recall == max(recalls.values())
    assert summary.best_step == min(step for step, recall in recalls.items() if recall == summary.best_recall)
    kept = load_file(tmp_path / "scratch" / f"checkpoint-{summary.best_step}" / "model.safetensors")
    assert_equal(dict(model.state_dict()), kept)


@pytest.mark.parametrize("form", [{}, {"copy_path": False, "item_dimension": 5}])
def test_two_processes_train_the_weights_of_one(form, tmp_path, tables, table_dir, config, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    world = make_world(tmp_path / "world", tables, table_dir, config, **form)
    # Three contexts a step: one for the first process, two for the second, so that their shares are unequal.
    run_training(world, Checkpoints(tmp_path / "one"), ignore)
    outputs = launch("tests.worlds.training", [world, tmp_path / "two", "", "", 0, "float32"])
    alone, together = (load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("one", "two"))
    start = build_untrained(world).model.state_dict()
    assert alone.keys() == together.keys() == start.keys()
    for name, weight in alone.items():
        moved = (weight - start[name]).norm()
        # Sums in another order, in 32 bits on every machine; a wrong share gives 40 per cent and more.
        assert (together[name] - weight).norm() <= 0.02 * moved + 1e-4, name
    assert outputs[0].count('"validation_recall"') == 4
    assert outputs[1] == ""  # one of them reports


@pytest.mark.parametrize("sharded", ["", "sharded"])
def test_two_machines_that_share_only_a_store_go_on_with_empty_disks(world, tmp_path, sharded):
    """SIGTERM reaches one of them, after two steps; both end, and two others train what one process trains."""
    expected, curve = {}, {}
    model, summary = run_training(world, Checkpoints(tmp_path / "one"), expected.setdefault)
    store = f"local://{tmp_path}/store"
    first, _ = launch("tests.worlds.training", [world, tmp_path / "first", store, sharded, 2], machines=True)
    *reports, end = map(json.loads, first.splitlines())
    assert "got SIGTERM at step 3" in end
    assert (tmp_path / "store" / "checkpoint-3" / "shards").exists() == bool(sharded)
    second, _ = launch("tests.worlds.training", [world, tmp_path / "second", store, sharded], machines=True)
    *others, best_step = map(json.loads, second.splitlines())

    assert min(step for step, _ in others) > 3
    for step, metrics in [*reports, *others]:
        curve.setdefault(step, metrics)
    assert curve.keys() == expected.keys()
    for step, metrics in expected.items():
        for name in {"loss", "recall_loss", "grad_norm"} & metrics.keys():
            assert curve[step][name] == pytest.approx(metrics[name], rel=0.02), (step, name)
    together = torch.load(tmp_path / "second" / "model.pt", weights_only=True)
    start = build_untrained(world).model.state_dict()
    if best_step == summary.best_step:  # the recall of this tiny world has ties
        for name, weight in model.state_dict().items():
            # Adam moves an entry by the sign of its gradient, chance where there is hardly any: one may differ.
            apart = (together[name] - weight).abs().flatten().sort().values
            apart = apart[:-1] if len(apart) >= 16 else apart
            assert apart.norm() <= 0.1 * (weight - start[name]).norm() + 1e-4, name


def test_patience_ends_a_training_that_no_longer_improves(tmp_path, tables, table_dir, config):
    # Rates so small that no evaluation differs from the first, which therefore stays the best.
    still = {"learning_rate": 1e-12, "backbone_learning_rate": 1e-12, "max_steps": 40, "eval_steps": 2}
    world = make_world(tmp_path / "still", tables, table_dir, config, **still)
    _, summary = run_training(world, Checkpoints(tmp_path / "scratch"), ignore, patience=3)
    assert (summary.best_step, summary.steps, summary.stopped_by) == (2, 8, "patience")
    often = Checkpoints(tmp_path / "often", minutes=1e-9)  # saves between evaluations are no evaluations
    _, summary = run_training(world, often, ignore, patience=3)
    assert (summary.best_step, summary.steps, summary.stopped_by) == (2, 8, "patience")
    _, summary = run_training(world, Checkpoints(tmp_path / "never"), ignore)
    assert (summary.steps, summary.stopped_by) == (40, "steps")


@pytest.mark.parametrize(
    ("patience", "options"),
    [(1, {"learning_rate": 1e-12, "backbone_learning_rate": 1e-12}), (0, {"max_seconds": 1e-3})],
)
def test_a_training_that_has_ended_takes_no_step_when_it_is_started_again(
    tmp_path, tables, table_dir, config, patience, options
):
    """The stage may be killed while popularity is set, or the model is written."""
    world = make_world(tmp_path / "w", tables, table_dir, config, max_steps=12, eval_steps=2, **options)
    first, ended = run_training(world, Checkpoints(tmp_path / "scratch"), ignore, patience=patience)
    assert (ended.steps, ended.stopped_by) == ((4, "patience") if patience else (1, "time"))

    def never(step, metrics):
        raise AssertionError(f"step {step} again")

    for _ in range(2):
        again, summary = run_training(world, Checkpoints(tmp_path / "scratch"), never, patience=patience)
        assert (summary.steps, summary.best_step, summary.stopped_by) == (
            ended.steps,
            ended.best_step,
            ended.stopped_by,
        )
        assert all(torch.equal(weight, first.state_dict()[name]) for name, weight in again.state_dict().items())


def test_patience_counts_from_the_best_evaluation_though_its_weights_are_lost(
    tmp_path, tables, table_dir, config, monkeypatch
):
    still = {"learning_rate": 1e-12, "backbone_learning_rate": 1e-12, "max_steps": 40, "eval_steps": 2}
    world = make_world(tmp_path / "still", tables, table_dir, config, **still)
    save = Checkpoints.save

    def on_a_full_disk(self, step, best, seconds, write, **options):
        def fail(folder):
            raise OSError(28, "No space left on device")

        return save(self, step, best, seconds, fail if step == 2 else write, **options)

    monkeypatch.setattr(Checkpoints, "save", on_a_full_disk)
    _, summary = run_training(world, Checkpoints(tmp_path / "scratch"), ignore, patience=1)
    assert (summary.best_step, summary.steps, summary.stopped_by) == (4, 4, "patience")
    assert summary.best_recall > 0


def test_curves_show_speed_memory_gradients_and_both_rates(world, tmp_path, config, monkeypatch):
    logged, labels, build = {}, {}, TrainingSteps.__getitem__

    def look(steps, step):
        batch = build(steps, step)
        labels[step] = len(batch["labels"])
        return batch

    monkeypatch.setattr(TrainingSteps, "__getitem__", look)

    def note(step, metrics):
        logged.setdefault(step, {}).update(metrics)

    run_training(world, Checkpoints(tmp_path / "scratch"), note)
    for step in (2, 4, 6, 8):
        assert {"loss", "recall_loss", "grad_norm", "validation_recall"} <= logged[step].keys()
        assert all(math.isfinite(value) for value in logged[step].values())
        assert ("text_loss" in logged[step]) == (labels[step - 2] + labels[step - 1] > 0)
        loss = logged[step]["recall_loss"] + 0.3 * logged[step].get("text_loss", 0.0)
        assert logged[step]["loss"] == pytest.approx(loss, rel=1e-3)
        assert logged[step]["grad_norm"] > 0
        assert 0.1 < logged[step]["peak_memory_gib"] < 24
        assert logged[step]["examples_per_second"] > 1
        ratio = config.urm.backbone_learning_rate / config.urm.learning_rate
        assert logged[step]["backbone_learning_rate"] == pytest.approx(logged[step]["learning_rate"] * ratio)
    assert any("text_loss" in metrics for metrics in logged.values())
    assert logged[8]["learning_rate"] < logged[2]["learning_rate"] <= config.urm.learning_rate
