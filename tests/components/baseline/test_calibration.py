import dataclasses

import numpy as np
import torch

from components.baseline.batches import Batcher
from components.baseline.calibration import calibrate_tasks
from components.baseline.id_vectors import read_ids
from components.baseline.network import RAMPS
from components.baseline.target_attention import Frozen, TargetAttentionScorer, build_network
from components.baseline.training import validation_recall
from components.config import RunConfig
from components.items.id_scores import AGE_DECAY
from components.items.id_vectors import URM_SCALE
from components.items.ramps import DOUBLINGS, logarithm_slopes, ramp_features
from tests.worlds.baseline import *  # noqa: F403  # fixtures

K = 20


def test_a_network_that_has_popularity_the_wrong_way_round_is_set_right(data, config: RunConfig) -> None:
    torch.manual_seed(0)
    network, batcher = build_network(data, config.baseline), Batcher(data, 30)
    counts = network.shape.num_counts
    with torch.no_grad():
        network.popularity_to_score.copy_(
            logarithm_slopes([-1.0, *[0.0] * (counts - 1)], RAMPS).expand(len(network.popularity_to_score), -1)
        )
    rows = data.examples.rows("validation")
    before, recall = TargetAttentionScorer(network, batcher).score(rows), validation_recall(network, batcher, K)
    found = calibrate_tasks(network, batcher, K)
    after = TargetAttentionScorer(network, batcher).score(rows)
    names = [task.name for task in data.tasks]
    assert set(found) <= set(names)
    assert any(calibration.taken for calibration in found.values())
    assert validation_recall(network, batcher, K)["mean"] > recall["mean"] + 0.05
    features = ramp_features(torch.from_numpy(data.items.log_counts[:, :1]), 1)
    first = {prompt: names[place] for place, prompt in reversed(list(enumerate(data.prompts)))}
    for row, old, new in zip(rows, before, after, strict=True):
        slopes = found[first[data.prompts[data.examples.tasks[row]]]].slopes
        assert slopes.shape == (DOUBLINGS,)
        np.testing.assert_allclose((new - old).numpy(), (features @ slopes).numpy(), atol=1e-3)


def test_a_task_gets_what_id_vectors_alone_say_where_it_pays(data, world, config: RunConfig) -> None:
    """Next purchases follow the ID vectors, which the network leaves out; the other tasks are what it says."""
    torch.manual_seed(0)
    ids = read_ids(world.folder / "item_table", data.items.ids)
    both = np.concatenate([ids.candidate, ids.history], axis=1)
    network, batcher = build_network(data, config.baseline, Frozen(None, both, both)), Batcher(data, 30)
    rows, follows = np.arange(len(data.examples.ids)), data.tasks[0].name
    before = TargetAttentionScorer(network, batcher).score(rows).numpy()
    said = np.zeros_like(before)
    for row, context in enumerate(data.examples.contexts):
        history = data.contexts.items[data.contexts.offsets[context] : data.contexts.offsets[context + 1]][:30]
        weights = np.arange(1, len(history) + 1) ** -AGE_DECAY
        said[row] = URM_SCALE * (weights / max(weights.sum(), 1) @ ids.history[history]) @ ids.candidate.T
    own = data.prompts[data.examples.tasks] == data.prompts[0]
    truth = np.where(own[:, None], before + 3 * said, before)
    wanted = np.argsort(-truth, axis=1)[:, :3]
    examples = dataclasses.replace(
        data.examples, targets=wanted.ravel(), target_offsets=np.arange(len(rows) + 1) * wanted.shape[1]
    )
    followed = dataclasses.replace(data, examples=examples)
    found = calibrate_tasks(network, Batcher(followed, 30), K)
    weight, slopes = found[follows].id_weight, found[follows].slopes
    assert weight > 0
    assert found[follows].recall > found[follows].before
    after = TargetAttentionScorer(network, batcher).score(rows).numpy()
    features = ramp_features(torch.from_numpy(data.items.log_counts[:, :1]), 1)
    np.testing.assert_allclose((after - before)[own], weight * said[own] + (features @ slopes).numpy(), atol=1e-3)
    others = {name: one for name, one in found.items() if data.prompts[_place(data, name)] != data.prompts[0]}
    assert not any(calibration.id_weight for calibration in others.values())


def _place(data, name: str) -> int:
    return [task.name for task in data.tasks].index(name)
