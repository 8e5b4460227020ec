import numpy as np
import torch

from components.baseline.batches import Batcher
from components.baseline.calibration import calibrate_popularity
from components.baseline.network import RAMPS
from components.baseline.target_attention import TargetAttentionScorer, build_network
from components.baseline.training import validation_recall
from components.config import RunConfig
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
    found = calibrate_popularity(network, batcher, K)
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
