import time

import numpy as np
import pytest
import torch

from components.urm.training.meter import Meter, peak_memory


def alone(values):
    return values


def test_losses_are_means_over_the_steps_since_the_last_report():
    meter = Meter("recall_loss", "text_loss")
    meter.add(2.0, 0.5, examples=3)
    meter.add(4.0, 0.0, examples=5)
    figures = meter.report(alone, 1)
    assert (figures["recall_loss"], figures["text_loss"]) == (3.0, 0.25)
    meter.add(7.0, 1.0, examples=1)
    assert meter.report(alone, 1)["recall_loss"] == 7.0


def test_over_processes_losses_are_averaged_and_examples_added():
    meter = Meter("loss")
    meter.add(2.0, examples=3)
    time.sleep(0.05)
    # The other process: a loss of 4 over 5 examples.
    figures = meter.report(lambda own: own + torch.tensor([4.0, 5.0], dtype=torch.float64), 2)
    assert figures["loss"] == 3.0
    assert 8 / 0.5 < figures["examples_per_second"] <= 8 / 0.05


def test_evaluation_does_not_lower_the_speed():
    meter = Meter("loss")
    meter.add(1.0, examples=10)
    time.sleep(0.02)
    with meter.paused():
        time.sleep(0.4)
    assert meter.report(alone, 1)["examples_per_second"] > 10 / 0.3


def test_peak_memory_rises_with_what_the_process_holds_and_never_falls():
    before = peak_memory("cpu")["peak_memory_gib"]
    more = int((before + 0.3) * 1024**3)  # more than the process ever held
    block = np.ones(more // 8)
    grown = peak_memory("cpu")["peak_memory_gib"]
    assert grown > before + 0.2
    del block
    assert peak_memory("cpu")["peak_memory_gib"] == pytest.approx(grown, abs=0.1)
    assert peak_memory("cpu").keys() == {"peak_memory_gib"}
