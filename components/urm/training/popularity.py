"""Where training begins with popularity: weights of the counts that explain the targets of each task.

    U items · R popularity features f (heads.py) · T tasks, those with one prompt as one
    n_t examples of task t · p_t(i) share of item i among their targets

    W_t = argmin  -Σᵢ p_t(i) f_i·w  +  log Σᵢ exp f_i·w  +  |w|² / (2 n_t)

That is what the sampled NCE would find if popularity were all that there is, under a normal prior of unit variance. It
is convex and takes seconds, while steps of a few contexts end at weights of chance (docs/results/training.md).
"""

import numpy as np
import numpy.typing as npt
import torch

from components.items.ramps import ramp_features
from components.items.table import POPULARITY
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import Example, Groups
from components.urm.data.request import Ids, UserContext
from components.urm.network.model import Urm

_ITERATIONS = 200
_EXAMPLES_PER_TASK = 4  # whose prompts stand for the task's
_CONTEXTS = 256  # in which these are looked for

Floats = npt.NDArray[np.float64]


def begin_with_popularity(model: Urm, groups: Groups, builder: BatchBuilder, item_ids: Ids) -> None:
    """Fit the popularity weights of each task to its targets in training, among all items of the catalogue.

    Tasks with one prompt are one task here: their texts differ by queries alone, so that no weights could lead from
    them to two fits. A task without an example in the first contexts, or without a known target, begins with the mean
    of the others.
    """
    targets = {task: counts for task, counts in groups.count_targets(item_ids).items() if counts.any()}
    asked = [
        (context, [example.request for example in examples])
        for context, examples in _some_of_each_task(groups, list(targets))
    ]
    if not asked:
        return
    prompts = {one.task.name: one.task.prompt for _, requests in asked for one in requests}
    by_prompt = {prompt: np.zeros(len(item_ids)) for _, prompt in sorted(prompts.items())}
    for task, prompt in prompts.items():
        by_prompt[prompt] += targets[task]
    log_counts, _ = builder.reader.table.gather(POPULARITY, item_ids)
    weights = fit_popularity(torch.from_numpy(log_counts), np.stack(list(by_prompt.values())), model.ramps)
    blocks = [(context, [builder.writer.block(one.task, one.query) for one in requests]) for context, requests in asked]
    places = {prompt: place for place, prompt in enumerate(by_prompt)}
    numbers = [places[one.task.prompt] for _, requests in asked for one in requests]
    model.begin_with_popularity(builder.build(blocks)[0], torch.tensor(numbers), weights)


def fit_popularity(log_counts: torch.Tensor, targets: Floats, ramps: int) -> torch.Tensor:
    """W [T, R], from log(1 + baskets) [U, G] and how often each item is a target of each task, somewhere [T, U].

    `ramps`: for each doubling of a count.
    """
    # Most of a catalogue is sold rarely, so that many items have the same counts: one row stands for all of them.
    distinct, where, sizes = np.unique(log_counts.numpy(), axis=0, return_inverse=True, return_counts=True)
    features = ramp_features(torch.from_numpy(distinct).float(), ramps)
    log_sizes = torch.from_numpy(sizes).float().log()[:, None]
    of_tasks = [np.bincount(where.ravel(), weights=counts, minlength=len(distinct)) for counts in targets]
    counted = torch.from_numpy(np.stack(of_tasks, axis=1)).float()  # [distinct, T]
    examples = counted.sum(dim=0)
    weights = torch.zeros(features.shape[1], len(targets), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def evaluate() -> float:
        optimizer.zero_grad()
        scores = features @ weights
        prior = (weights.square().sum(dim=0) / (2 * examples)).sum()
        loss = (scores + log_sizes).logsumexp(dim=0).sum() - (counted / examples * scores).sum() + prior
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return float(loss.detach())

    optimizer.step(evaluate)  # type: ignore[no-untyped-call]  # as above
    return weights.detach().T.contiguous()


def _some_of_each_task(groups: Groups, tasks: list[str]) -> list[tuple[UserContext, list[Example]]]:
    left = dict.fromkeys(tasks, _EXAMPLES_PER_TASK)
    chosen = []
    for number in range(min(len(groups), _CONTEXTS)):
        context, examples = groups[number]
        mine = []
        for example in examples:
            name = example.request.task.name
            if left.get(name):
                left[name] -= 1
                mine.append(example)
        if mine:
            chosen.append((context, mine))
    return chosen
