import torch

from benchmarks.throughput import WARM_UP_STEPS, ClockedSteps, measure_peak


class Steps:
    """Batches of two, then of four examples."""

    def __len__(self):
        return 6

    def __getitem__(self, step):
        return {"block_rows": torch.zeros(2 if step < WARM_UP_STEPS else 4)}


def test_steps_are_clocked_after_the_warm_up():
    clocked = ClockedSteps(Steps())
    for step in range(len(clocked)):
        clocked[step]
    clocked.fetched = [0.0, 100.0, 200.0, 300.0, 301.0, 302.0]
    assert clocked.seconds_per_step == 1
    assert clocked.examples_per_step == 4


def test_peak_is_a_plausible_speed():
    assert 1e8 < measure_peak(torch.float32, "cpu") < 1e14
