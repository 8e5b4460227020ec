"""After training: how far each task should follow popularity, by the validation examples (items/calibration.py)."""

from collections.abc import Mapping

import numpy as np
import torch

from components.device import to_device
from components.items.calibration import DEPTH, Calibration, Shortlists, calibrate, spread_slopes
from components.items.table import POPULARITY
from components.urm.data.examples import Example
from components.urm.network.model import Urm
from components.urm.training.validation import Validation

_EXAMPLES_PER_TASK = 16  # whose prompts stand for the task's


def calibrate_popularity(model: Urm, validation: Validation) -> Mapping[str, Calibration]:
    """Shift the popularity weights of each task that gains by it; returns what every task got.

    The scores of all user vectors move by the same function of an item's count.
    """
    examples, k = validation.examples, validation.k
    by_task: dict[str, list[int]] = {}
    contexts: dict[int, int] = {}  # by identity: requests that share a context share the object
    for number, example in enumerate(examples):
        by_task.setdefault(example.request.task.name, []).append(number)
        contexts.setdefault(id(example.request.context), len(contexts))
    found, scores = validation.recall(model, max(DEPTH, 2 * k))
    table = validation.builder.reader.table
    calibrations = {}
    for task, numbers in by_task.items():
        width = max(len(found[number]) for number in numbers)
        items = np.stack([np.pad(found[n], (0, width - len(found[n])), constant_values=-1) for n in numbers])
        lists = Shortlists(
            contexts=np.array([contexts[id(examples[n].request.context)] for n in numbers]),
            scores=np.stack([np.pad(scores[n], (0, width - len(scores[n])), constant_values=-np.inf) for n in numbers]),
            log_counts=table.gather(POPULARITY, items.ravel())[0][:, 0].reshape(items.shape),
            wanted=np.stack([np.isin(row, examples[n].targets) for row, n in zip(items, numbers, strict=True)]),
            num_targets=np.array([len(examples[n].targets) for n in numbers]),
        )
        calibrations[task] = calibrate(lists, k)
    _shift(model, validation, {task: by_task[task][:_EXAMPLES_PER_TASK] for task in by_task}, calibrations)
    return calibrations


def _shift(
    model: Urm, validation: Validation, asked: Mapping[str, list[int]], calibrations: Mapping[str, Calibration]
) -> None:
    """Add the slopes to the weights of each task, which the states of some of its prompts stand for."""
    if not any(calibration.taken for calibration in calibrations.values()):
        return
    names, builder = list(calibrations), validation.builder
    some: list[Example] = [validation.examples[number] for numbers in asked.values() for number in numbers]
    blocks = [(one.request.context, [builder.writer.block(one.request.task, one.request.query)]) for one in some]
    counts = builder.reader.table.modalities[POPULARITY].vectors.shape[1]
    slopes = {place: calibrations[name].slopes for place, name in enumerate(names)}
    weights = spread_slopes(slopes, len(names), counts, model.ramps)
    tasks = torch.tensor([names.index(one.request.task.name) for one in some])
    device = model.user_head.log_scale.device
    model.shift_popularity(to_device(builder.build(blocks)[0], device), tasks.to(device), weights.to(device))
