"""After training: how far each task should follow popularity and ID vectors, by the validation examples.

See items/calibration.py.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from components.device import to_device
from components.items.calibration import DEPTH, Calibration, Floats, Ints, Shortlists, calibrate, spread_slopes
from components.items.id_scores import history_weights, score_items
from components.items.table import HISTORY_ROLE, POPULARITY
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import Example
from components.urm.data.request import UserContext
from components.urm.inference import UrmRecaller
from components.urm.network.model import Urm
from components.urm.training.validation import Validation

_EXAMPLES_PER_PROMPT = 16  # whose texts stand for the prompt's


def calibrate_tasks(
    model: Urm, validation: Validation, report: Callable[[int], None] | None = None
) -> Mapping[str, Calibration]:
    """Shift the weights of popularity and of ID vectors of each task that gains by it; returns what every task got.

    `report` is told how many examples are ranked.

    The scores of all user vectors move by the same. Tasks with one prompt are one task to the model: the states of
    their texts differ by queries alone.
    """
    examples, k = validation.examples, validation.k
    by_prompt: dict[str, list[int]] = {}
    contexts: dict[int, UserContext] = {}  # by identity: requests that share a context share the object
    for number, example in enumerate(examples):
        by_prompt.setdefault(example.request.task.prompt, []).append(number)
        contexts.setdefault(id(example.request.context), example.request.context)
    places = {key: place for place, key in enumerate(contexts)}
    owners = np.array([places[id(example.request.context)] for example in examples])
    found, scores = validation.recall(model, max(DEPTH, 2 * k), report)
    score_ids = _id_scorer(model, validation, list(contexts.values()))
    table = validation.builder.reader.table
    calibrations: list[Calibration] = []
    of_tasks: dict[str, Calibration] = {}
    for numbers in by_prompt.values():
        width = max(len(found[number]) for number in numbers)
        items = np.stack([np.pad(found[n], (0, width - len(found[n])), constant_values=-1) for n in numbers])
        lists = Shortlists(
            contexts=owners[numbers],
            scores=np.stack([np.pad(scores[n], (0, width - len(scores[n])), constant_values=-np.inf) for n in numbers]),
            log_counts=table.gather(POPULARITY, items.ravel())[0][:, 0].reshape(items.shape),
            wanted=np.stack([np.isin(row, examples[n].targets) for row, n in zip(items, numbers, strict=True)]),
            num_targets=np.array([len(examples[n].targets) for n in numbers]),
            id_scores=score_ids(owners[numbers], items) if score_ids else None,
        )
        calibrations.append(calibrate(lists, k))
        tasks = np.array([examples[n].request.task.name for n in numbers])
        of_tasks |= {str(task): calibrations[-1].part(tasks == task) for task in np.unique(tasks)}
    if any(calibration.taken for calibration in calibrations):
        asked = [[examples[n] for n in numbers[:_EXAMPLES_PER_PROMPT]] for numbers in by_prompt.values()]
        _shift(model, validation.builder, asked, calibrations)
    return of_tasks


def _id_scorer(
    model: Urm, validation: Validation, contexts: Sequence[UserContext]
) -> Callable[[Ints, Ints], Floats] | None:
    """What ID vectors alone say of items [E, K] for contexts that are named by their places [E], as the model adds it.

    None for a model that cannot add it.
    """
    if not model.user_head.id_scores:
        return None
    table = validation.builder.reader.table
    name = "id" + HISTORY_ROLE if "id" + HISTORY_ROLE in table.modalities else "id"
    recaller = UrmRecaller(model, validation.builder, validation.combine)

    def of_user(context: UserContext) -> torch.Tensor:
        vectors = torch.from_numpy(table.gather(name, validation.builder.known_items(context))[0])
        return history_weights(torch.ones(1, len(vectors)))[0] @ vectors

    device = model.user_head.log_scale.device
    users = model.place_ids(torch.stack([of_user(context) for context in contexts]).to(device)).cpu()
    columns = users.any(dim=0)  # those of the ID vectors, in an item space that is not low-rank
    users = users[:, columns]

    def score(owners: Ints, items: Ints) -> Floats:
        distinct, rows = np.unique(items, return_inverse=True)
        candidates = torch.from_numpy(recaller.encode_items(distinct)[:, : len(columns)])[:, columns]
        scores: Floats = score_items(users[owners], candidates, torch.from_numpy(rows.reshape(items.shape))).numpy()
        return scores

    return score


def _shift(
    model: Urm, builder: BatchBuilder, asked: Sequence[Sequence[Example]], calibrations: Sequence[Calibration]
) -> None:
    """Add what each prompt gets to its weights, which the states of some of its texts stand for."""
    some = [one.request for examples in asked for one in examples]
    blocks = [(one.context, [builder.writer.block(one.task, one.query)]) for one in some]
    prompts = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(examples) for examples in asked]))
    counts = builder.reader.table.modalities[POPULARITY].vectors.shape[1]
    slopes = {place: calibration.slopes for place, calibration in enumerate(calibrations)}
    weights = spread_slopes(slopes, len(slopes), counts, model.ramps)
    id_weights = torch.tensor([calibration.id_weight for calibration in calibrations])
    device, training = model.user_head.log_scale.device, model.training
    model.eval()  # dropout of the backbone would move the states of the texts
    batch, prompts = to_device(builder.build(blocks)[0], device), prompts.to(device)
    model.shift_popularity(batch, prompts, weights.to(device))
    if id_weights.any():
        model.shift_id_scores(batch, prompts, id_weights.to(device))
    model.train(training)
