"""After training: how far each task should follow popularity, by the validation examples (items/calibration.py)."""

from collections.abc import Mapping

import numpy as np
import torch

from components.baseline.batches import Batcher
from components.baseline.data import Dataset, Ints, gather
from components.baseline.network import RAMPS, TargetAttention
from components.baseline.ranking import Ranking, rank
from components.baseline.target_attention import TargetAttentionScorer
from components.items.calibration import DEPTH, Calibration, Shortlists, calibrate, spread_slopes


def calibrate_popularity(network: TargetAttention, batcher: Batcher, k: int) -> Mapping[str, Calibration]:
    """Shift the popularity weights of each task that gains by it, as URM's are; returns what every task got.

    Tasks with one prompt are one task to the network.
    """
    data = batcher.data
    ranking = rank(TargetAttentionScorer(network, batcher), data, data.examples.rows("validation"), max(DEPTH, 2 * k))
    tasks = data.examples.tasks[ranking.rows]
    prompts = data.prompts[tasks]
    calibrations = {int(prompt): calibrate(_of_prompt(ranking, data, prompts == prompt), k) for prompt in set(prompts)}
    slopes = {prompt: calibration.slopes for prompt, calibration in calibrations.items()}
    weights = spread_slopes(slopes, len(network.popularity_to_score), network.shape.num_counts, RAMPS)
    with torch.no_grad():
        network.popularity_to_score.add_(weights)
    found = {}
    for task in np.unique(tasks):
        prompt = int(data.prompts[task])
        found[data.tasks[task].name] = calibrations[prompt].part(tasks[prompts == prompt] == task)
    return found


def _of_prompt(ranking: Ranking, data: Dataset, mine: Ints) -> Shortlists:
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
    )
