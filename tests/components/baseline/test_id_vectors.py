"""The ranker gives the scores of the network whose vectors it reads."""

import numpy as np
import pytest
import torch

from components.baseline.data import Dataset
from components.baseline.id_vectors import FrozenIds, IdVectors, read_ids
from components.items.id_network import REACH, IdNetwork, ItemContent
from components.items.id_vectors import read_vectors
from components.items.table import HISTORY_ROLE, ItemTable
from tests.worlds.baseline import history_of

DECAY = 0.7


def test_scores_are_those_of_the_network(data: Dataset) -> None:
    num_items = len(data.items)
    random = np.random.default_rng(0)
    content = ItemContent(random.normal(size=(num_items, 8)).astype(np.float32), np.zeros((num_items, 1), np.int64))
    network = IdNetwork(content, np.ones(num_items, dtype=bool), dimension=12, seed=0)
    network.set_counts(data.items.train_events.astype(np.float32), 0)
    network.decay.data.fill_(DECAY)
    vectors = read_vectors(network.eval())
    ids = FrozenIds(vectors.candidate, vectors.history, network.log_count.numpy())
    rows = data.examples.rows("test")[:6]
    scores = IdVectors(data, ids, 7.0, age_decay=DECAY, popularity=network.popularity.item()).score(rows)
    for row, found in zip(rows, scores, strict=True):
        part = history_of(data, row)
        items, days = data.contexts.items[part][:REACH], data.contexts.days[part][:REACH]
        weeks = (days // 7).tolist()
        ages = torch.tensor([[1 + sorted(set(weeks)).index(week) for week in weeks]])
        assert len(set(weeks)) > 1
        with torch.no_grad():
            user = network.users(torch.from_numpy(items)[None], ages) * network.log_scale.exp()
            expected = user @ network.vectors(1, torch.arange(num_items)).T + network.popularity * network.log_count
        assert found.numpy() == pytest.approx(expected[0].numpy(), rel=1e-3, abs=1e-3)


def test_reads_both_roles_and_the_counts_of_the_catalogue(data: Dataset, world) -> None:
    ids = read_ids(world.folder / "item_table", data.items.ids)
    table = ItemTable.open(world.folder / "item_table")
    for name, found in (("id", ids.candidate), ("id" + HISTORY_ROLE, ids.history)):
        assert np.array_equal(found, table.gather(name, data.items.ids)[0])
    assert np.expm1(ids.log_count) == pytest.approx(data.items.train_events, rel=1e-2)
