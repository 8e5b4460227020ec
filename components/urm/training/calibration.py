"""After training: how far each task should follow popularity, by the validation examples (items/calibration.py)."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from components.device import to_device
from components.items.calibration import DEPTH, Calibration, Shortlists, calibrate, spread_slopes
from components.items.table import POPULARITY
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import Example
from components.urm.network.model import Urm
from components.urm.training.validation import Validation

_EXAMPLES_PER_PROMPT = 16  # whose texts stand for the prompt's


def calibrate_popularity(
    model: Urm, validation: Validation, report: Callable[[int], None] | None = None
) -> Mapping[str, Calibration]:
    """Shift the popularity weights of each task that gains by it; returns what every task got.

    `report` is told how many examples are ranked.

    The scores of all user vectors move by the same function of an item's count. Tasks with one prompt are one task to
    the model: the states of their texts differ by queries alone.
    """
    examples, k = validation.examples, validation.k
    by_prompt: dict[str, list[int]] = {}
    contexts: dict[int, int] = {}  # by identity: requests that share a context share the object
    for number, example in enumerate(examples):
        by_prompt.setdefault(example.request.task.prompt, []).append(number)
        contexts.setdefault(id(example.request.context), len(contexts))
    found, scores = validation.recall(model, max(DEPTH, 2 * k), report)
    table = validation.builder.reader.table
    calibrations: list[Calibration] = []
    of_tasks: dict[str, Calibration] = {}
    for numbers in by_prompt.values():
        width = max(len(found[number]) for number in numbers)
        items = np.stack([np.pad(found[n], (0, width - len(found[n])), constant_values=-1) for n in numbers])
        lists = Shortlists(
            contexts=np.array([contexts[id(examples[n].request.context)] for n in numbers]),
            scores=np.stack([np.pad(scores[n], (0, width - len(scores[n])), constant_values=-np.inf) for n in numbers]),
            log_counts=table.gather(POPULARITY, items.ravel())[0][:, 0].reshape(items.shape),
            wanted=np.stack([np.isin(row, examples[n].targets) for row, n in zip(items, numbers, strict=True)]),
            num_targets=np.array([len(examples[n].targets) for n in numbers]),
        )
        calibrations.append(calibrate(lists, k))
        tasks = np.array([examples[n].request.task.name for n in numbers])
        of_tasks |= {str(task): calibrations[-1].part(tasks == task) for task in np.unique(tasks)}
    if any(calibration.taken for calibration in calibrations):
        asked = [[examples[n] for n in numbers[:_EXAMPLES_PER_PROMPT]] for numbers in by_prompt.values()]
        _shift(model, validation.builder, asked, [calibration.slopes for calibration in calibrations])
    return of_tasks


def _shift(
    model: Urm, builder: BatchBuilder, asked: Sequence[Sequence[Example]], slopes: Sequence[torch.Tensor]
) -> None:
    """Add the slopes to the weights of each prompt, which the states of some of its texts stand for."""
    some = [one.request for examples in asked for one in examples]
    blocks = [(one.context, [builder.writer.block(one.task, one.query)]) for one in some]
    prompts = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(examples) for examples in asked]))
    counts = builder.reader.table.modalities[POPULARITY].vectors.shape[1]
    weights = spread_slopes(dict(enumerate(slopes)), len(slopes), counts, model.ramps)
    device, training = model.user_head.log_scale.device, model.training
    model.eval()  # dropout of the backbone would move the states of the texts
    model.shift_popularity(to_device(builder.build(blocks)[0], device), prompts.to(device), weights.to(device))
    model.train(training)
