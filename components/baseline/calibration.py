"""After training: how far each task should follow popularity and ID vectors, by the validation examples.

See items/calibration.py.
"""

from collections.abc import Mapping

import numpy as np
import torch

from components.baseline.batches import Batcher
from components.baseline.data import Dataset, Floats, Ints, gather
from components.baseline.network import RAMPS, TargetAttention
from components.baseline.ranking import Ranking, rank
from components.baseline.target_attention import TargetAttentionScorer
from components.items.calibration import DEPTH, Calibration, Shortlists, calibrate, spread_slopes

_EXAMPLES_AT_ONCE = 256  # of whose contexts the scores of all items are in memory


def calibrate_tasks(network: TargetAttention, batcher: Batcher, k: int) -> Mapping[str, Calibration]:
    """Shift the weights of popularity and of ID vectors of each task that gains by it, as URM's are.

    Returns what every task got. Tasks with one prompt are one task to the network.
    """
    data = batcher.data
    ranking = rank(TargetAttentionScorer(network, batcher), data, data.examples.rows("validation"), max(DEPTH, 2 * k))
    id_scores = _score_ids(network, batcher, ranking) if network.shape.id_dimension else None
    tasks = data.examples.tasks[ranking.rows]
    prompts = data.prompts[tasks]
    calibrations = {
        int(prompt): calibrate(_of_prompt(ranking, id_scores, data, prompts == prompt), k) for prompt in set(prompts)
    }
    slopes = {prompt: calibration.slopes for prompt, calibration in calibrations.items()}
    weights = spread_slopes(slopes, len(network.popularity_to_score), network.shape.num_counts, RAMPS)
    with torch.no_grad():
        network.popularity_to_score.add_(weights)
        if id_scores is not None:
            for prompt, calibration in calibrations.items():
                network.ids_to_score[prompt] += calibration.id_weight
    found = {}
    for task in np.unique(tasks):
        prompt = int(data.prompts[task])
        found[data.tasks[task].name] = calibrations[prompt].part(tasks[prompts == prompt] == task)
    return found


@torch.no_grad()
def _score_ids(network: TargetAttention, batcher: Batcher, ranking: Ranking) -> Floats:
    """What the ID vectors alone say of the items of a ranking, in its shape; anything where there is no item."""
    contexts = batcher.data.examples.contexts[ranking.rows]
    scores: Floats = np.empty(ranking.items.shape, dtype=np.float32)
    for start in range(0, len(contexts), _EXAMPLES_AT_ONCE):
        part = slice(start, start + _EXAMPLES_AT_ONCE)
        distinct, positions = np.unique(contexts[part], return_inverse=True)
        of_catalogue = network.id_scores(batcher.history(distinct).items).numpy()
        scores[part] = of_catalogue[positions[:, None], ranking.items[part]]
    return scores


def _of_prompt(ranking: Ranking, id_scores: Floats | None, data: Dataset, mine: Ints) -> Shortlists:
    """The rankings of some examples [E], and what they ask for."""
    rows, items = ranking.rows[mine], ranking.items[mine]
    targets, owner = gather(data.examples.targets, data.examples.target_offsets, rows)
    num_items = len(data.items)
    keys = np.where(items >= 0, np.arange(len(rows))[:, None] * num_items + items, -1)
    return Shortlists(
        contexts=data.examples.contexts[rows],
        scores=ranking.scores[mine],
        log_counts=data.items.log_counts[items, 0],
        wanted=np.isin(keys, owner * num_items + targets),
        num_targets=np.bincount(owner, minlength=len(rows)),
        id_scores=None if id_scores is None else id_scores[mine],
    )
