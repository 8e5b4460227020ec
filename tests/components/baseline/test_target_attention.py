"""The network scores a candidate alike on all its paths, and learns."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from components.baseline.batches import Batcher
from components.baseline.data import Dataset
from components.baseline.network import TargetAttention, match_features
from components.baseline.query_match import QueryMatcher
from components.baseline.ranking import mean_recall, rank
from components.baseline.target_attention import Frozen, TargetAttentionScorer, build_network, score_training_batch
from components.config import BaselineConfig, RunConfig
from tests.worlds.baseline import history_of, targets_of

OPTIONS = {"field_matches": True, "dropout": 0.4, "id_dropout": 0.3}


def make_ids(data: Dataset) -> Frozen:
    """ID vectors that differ at the two instants."""
    random = np.random.default_rng(0)
    now, past = (random.normal(size=(len(data.items), 6)).astype(np.float32) for _ in range(2))
    return Frozen(ids=now, ids_past=past)


@pytest.fixture(params=["plain", "with all options"])
def settings(request: pytest.FixtureRequest, config: RunConfig) -> BaselineConfig:
    return config.baseline.model_copy(update={} if request.param == "plain" else OPTIONS)


@pytest.fixture
def network(data: Dataset, settings: BaselineConfig) -> TargetAttention:
    torch.manual_seed(0)
    frozen = make_ids(data) if settings.field_matches else None
    network = build_network(data, settings, frozen).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # nothing may hide behind a zero
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return network


@pytest.fixture
def batcher(data: Dataset, settings: BaselineConfig) -> Batcher:
    matcher = QueryMatcher(data) if settings.field_matches else None
    return Batcher(data, settings.history_length, matcher=matcher)


def test_training_and_catalogue_scores_agree(data: Dataset, network: TargetAttention, batcher: Batcher) -> None:
    rows = data.examples.rows("test")[:12]
    catalogue = TargetAttentionScorer(network, batcher).score(rows)
    batch = batcher.training(rows)
    negatives = torch.arange(len(data.items))
    with torch.no_grad():
        own, shared = score_training_batch(network, batch, negatives)
    for row, context in enumerate(batch.examples.contexts.tolist()):
        items = batch.own.items[context]
        real = items < len(data.items)
        assert torch.allclose(own[row][real], catalogue[row][items[real]], atol=1e-4)
        # Shared negatives lack the match features: they agree outside the history.
        bought = items[batch.own.match[context, :, 0] > 0]
        outside = torch.ones(len(data.items), dtype=torch.bool).index_fill(0, bought, False)
        assert torch.allclose(shared[row][outside], catalogue[row][outside], atol=1e-4)
        assert not torch.allclose(shared[row][bought], catalogue[row][bought], atol=1e-2)


def test_scores_depend_neither_on_batch_nor_padding(data: Dataset, network: TargetAttention, batcher: Batcher) -> None:
    scorer, rows = TargetAttentionScorer(network, batcher), data.examples.rows("test")[:9]
    together = scorer.score(rows)
    for position in (0, 4, 8):
        assert torch.allclose(scorer.score(rows[position : position + 1])[0], together[position], atol=1e-4)


def test_targets_are_marked_once_each(data: Dataset, batcher: Batcher) -> None:
    rows = data.examples.rows("train")[:20]
    batch = batcher.training(rows)
    assert batch.targets.sum(dim=1).numpy() == pytest.approx(np.ones(len(rows)))
    for row, weights in zip(rows, batch.targets, strict=True):
        context = batch.examples.contexts[int(np.flatnonzero(rows == row)[0])]
        marked = batch.own.items[context][weights > 0]
        assert sorted(marked.tolist()) == sorted(targets_of(data, row))


def test_task_and_query_change_the_scores(data: Dataset, network: TargetAttention, batcher: Batcher) -> None:
    rows = data.examples.rows("test")
    same = rows[data.examples.contexts[rows] == data.examples.contexts[rows[0]]]
    scores = TargetAttentionScorer(network, batcher).score(same)
    assert len(same) > 1
    assert not torch.allclose(scores[0], scores[1], atol=1e-2)


def test_the_history_is_seen(data: Dataset, network: TargetAttention, batcher: Batcher) -> None:
    rows = data.examples.rows("test")[:3]
    long = TargetAttentionScorer(network, batcher).score(rows)
    short = TargetAttentionScorer(network, Batcher(data, 1, matcher=batcher.matcher)).score(rows)
    assert not torch.allclose(long, short, atol=1e-2)


def test_empty_histories_score_finitely(data: Dataset, network: TargetAttention, batcher: Batcher) -> None:
    rows = data.examples.rows("test")[:2]
    context = int(data.examples.contexts[rows[0]])
    offsets = data.contexts.offsets.copy()
    length = offsets[context + 1] - offsets[context]
    keep = np.r_[0 : offsets[context], offsets[context + 1] : len(data.contexts.items)]
    offsets[context + 1 :] -= length
    contexts = data.contexts
    columns = {name: getattr(contexts, name)[keep] for name in ("items", "counts", "days", "behaviors")}
    emptied = dataclasses.replace(contexts, **columns, offsets=offsets)
    world = Dataset(data.items, emptied, data.examples, data.tasks)
    scorer = TargetAttentionScorer(network, Batcher(world, 30, matcher=batcher.matcher))
    assert torch.isfinite(scorer.score(rows)).all()


def test_match_features_by_hand() -> None:
    features = match_features(torch.tensor([3.0]), torch.tensor([28.0]), torch.tensor([12.0]))[0]
    often, slow = np.log(4), 2 ** (-28 / 112)
    expected = [1, often, np.log(29) / 4, 2**-4, 0.5, slow, 0.25, often * slow]
    assert features.numpy() == pytest.approx(expected, rel=1e-5)


def test_tasks_of_one_prompt_are_one_task_to_the_network(data: Dataset, config: RunConfig) -> None:
    first, second, third = data.tasks
    world = dataclasses.replace(data, tasks=(first, second.model_copy(update={"prompt": first.prompt}), third))
    torch.manual_seed(0)
    network = build_network(world, config.baseline)
    assert network.shape.num_tasks == 2
    rows = data.examples.rows("test")
    pair = next(
        [row, other] for row, other in itertools.pairwise(rows)
        if data.examples.contexts[row] == data.examples.contexts[other] and data.examples.tasks[other] == 1
    )  # fmt: skip
    scores = TargetAttentionScorer(network, Batcher(world, 30)).score(np.array(pair))
    assert torch.allclose(scores[0], scores[1], atol=1e-5)
    batch = Batcher(world, 30).training(np.array(pair))
    assert batch.exclude_bought.tolist() == [False, True]  # the candidate filter stays that of the task


def test_popularity_begins_as_the_logarithm_of_all_baskets_and_each_task_learns_its_own(
    data: Dataset, config: RunConfig
) -> None:
    network = build_network(data, config.baseline)
    bias = network.popularity_bias()
    expected = np.broadcast_to(data.items.log_counts[:, 0], bias.shape)
    assert bias.detach().numpy() == pytest.approx(expected, abs=1e-3)
    rare = int(np.argmin(data.items.log_counts[:, 0]))
    bias[1, rare].neg().backward()
    assert network.popularity_to_score.grad is not None
    assert network.popularity_to_score.grad[[0, 2]].abs().sum() == 0


def test_no_input_is_counted_from_the_training_targets(data: Dataset, config: RunConfig) -> None:
    """An item that stands among the counted answers would be trusted for it, and is not at work."""
    trained = data.examples.rows("train")
    targets = data.examples.targets.copy()
    places = np.concatenate([np.arange(*data.examples.target_offsets[row : row + 2]) for row in trained])
    targets[places] = np.random.default_rng(0).permutation(targets[places])
    other = dataclasses.replace(data, examples=dataclasses.replace(data.examples, targets=targets))
    assert not np.array_equal(targets, data.examples.targets)
    networks = []
    for world in (data, other):
        torch.manual_seed(0)
        networks.append(build_network(world, config.baseline.model_copy(update=OPTIONS)))
    for (name, one), (_, another) in zip(*(list(n.named_buffers()) for n in networks), strict=True):
        assert torch.equal(one, another), name
    for (name, one), (_, another) in zip(*(list(n.named_parameters()) for n in networks), strict=True):
        assert torch.equal(one, another), name


def test_training_drops_ids_and_entries_and_reads_ids_of_the_past(data: Dataset, config: RunConfig) -> None:
    def vectors(**settings: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        without = {"dropout": 0.0, "id_dropout": 0.0}
        network = build_network(data, config.baseline.model_copy(update=without | settings))
        return network.train().item_vectors().detach(), network.eval().item_vectors().detach()

    trained, plain = vectors()
    assert torch.equal(trained, plain)
    trained, evaluated = vectors(dropout=0.5)
    assert torch.equal(evaluated, plain)
    assert float((trained == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert trained[trained != 0].numpy() == pytest.approx(2 * plain[trained != 0].numpy(), rel=1e-5)
    trained, evaluated = vectors(id_dropout=0.5)
    assert torch.equal(evaluated, plain)
    dropped = ~torch.isclose(trained, plain).all(dim=1)
    assert float(dropped.float().mean()) == pytest.approx(0.5, abs=0.1)
    ids = make_ids(data)
    torch.manual_seed(0)
    network = build_network(data, config.baseline.model_copy(update={"dropout": 0.0, "id_dropout": 0.0}), ids)
    for training, frozen in ((True, ids.ids_past), (False, ids.ids)):
        expected = plain + network.ids_to_item(torch.from_numpy(frozen))
        assert torch.allclose(network.train(training).item_vectors(), expected, atol=1e-5)
    assert not {"item_ids", "item_ids_past"} & network.state_dict().keys()  # they stay in the item tables


def test_matches_with_the_history_by_loops(data: Dataset, config: RunConfig) -> None:
    settings = config.baseline.model_copy(update=OPTIONS)
    network = build_network(data, settings)
    row = data.examples.rows("test")[0]
    history = data.contexts.items[history_of(data, row)][:30]
    padded = torch.from_numpy(np.append(history, len(data.items)))[None]
    found = network.match_history(padded, torch.arange(len(data.items)))[0]
    names = [data.items.names[column] for column in network.shape.matched_features]
    assert names == ["category_0", "category_1", "category_2", "brand"]
    for item in range(0, len(data.items), 17):
        paths = [data.items.categories[other] for other in history]
        path = data.items.categories[item]
        alike = [sum(other[:level] == path[:level] and len(path) >= level for other in paths) for level in (1, 2, 3)]
        brand = data.items.brands[item]
        alike.append(sum(brand == data.items.brands[other] for other in history if brand))
        assert found[item].numpy() == pytest.approx(np.log1p(alike), rel=1e-5)


def test_field_matches_find_a_category_before_any_training(data: Dataset, config: RunConfig) -> None:
    recalls = []
    for matched in (False, True):
        torch.manual_seed(0)
        settings = config.baseline.model_copy(update={"field_matches": matched})
        network = build_network(data, settings)
        scorer = TargetAttentionScorer(network, Batcher(data, 30, matcher=QueryMatcher(data) if matched else None))
        recall = mean_recall(rank(scorer, data, data.examples.rows("validation"), 20), data, 20)
        recalls.append(recall["text_query"])
    assert recalls[1] > recalls[0] + 0.1
