import time

import numpy as np
import pytest
import torch

from components.urm.training.meter import Meter, peak_memory


def alone(values):
    return values


def test_losses_are_weighted_means_over_the_steps_since_the_last_report():
    meter = Meter("recall_loss", "text_loss")
    meter.add((2.0, 1.0), (0.5, 4.0), examples=3)
    meter.add((4.0, 1.0), (0.0, 0.0), examples=5)  # a step without text
    meter.add((6.0, 1.0), (1.0, 4.0), examples=5)
    figures = meter.report(alone)
    assert (figures["recall_loss"], figures["text_loss"]) == (4.0, 0.75)
    meter.add((7.0, 1.0), (0.0, 0.0), examples=1)
    figures = meter.report(alone)
    assert figures["recall_loss"] == 7.0
    assert "text_loss" not in figures


def test_over_processes_losses_are_averaged_and_examples_added():
    meter = Meter("loss")
    meter.add((2.0, 0.75), examples=3)
    time.sleep(0.05)
    # The other process: a loss of 4 over 5 examples, which count for more.
    figures = meter.report(lambda own: own + torch.tensor([4.0 * 1.25, 1.25, 5.0], dtype=torch.float64))
    assert figures["loss"] == (2 * 0.75 + 4 * 1.25) / 2
    assert 8 / 0.5 < figures["examples_per_second"] <= 8 / 0.05


def test_sums_survive_an_interruption():
    meter, other = Meter("loss"), Meter("loss")
    meter.add((2.0, 1.0), examples=3)
    other.resume(meter.state(alone), first=True)
    other.add((4.0, 1.0), examples=5)
    assert other.report(alone)["loss"] == 3.0
    other.resume(meter.state(alone), first=False)  # the first process has them
    assert "loss" not in other.report(alone)


def test_evaluation_does_not_lower_the_speed():
    meter = Meter("loss")
    meter.add((1.0, 1.0), examples=10)
    time.sleep(0.02)
    with meter.paused():
        time.sleep(0.4)
    assert meter.report(alone)["examples_per_second"] > 10 / 0.3


def test_peak_memory_rises_with_what_the_process_holds_and_never_falls():
    before = peak_memory("cpu")["peak_memory_gib"]
    more = int((before + 0.3) * 1024**3)  # more than the process ever held
    block = np.ones(more // 8)
    grown = peak_memory("cpu")["peak_memory_gib"]
    assert grown > before + 0.2
    del block
    assert peak_memory("cpu")["peak_memory_gib"] == pytest.approx(grown, abs=0.1)
    assert peak_memory("cpu").keys() == {"peak_memory_gib"}
