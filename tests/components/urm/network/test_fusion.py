import hashlib

import numpy as np
import pytest
import torch

from components.items.table import ItemTable
from components.urm.network.fusion import HistoryEmbedding, ItemFusion


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    return ItemFusion({"id": 4, "text": 6, "price": 2}, fusion_width=8, token_width=10)


def features(present=True):
    torch.manual_seed(1)
    vectors = {"id": torch.randn(3, 4), "text": torch.randn(3, 6), "price": torch.randn(3, 2)}
    return vectors, {name: torch.full((3,), present) for name in vectors}


def test_any_modality_is_fused_without_a_code_change(fusion):
    vectors, present = features()
    fused = fusion(vectors, present)
    assert fusion.tokens(fused).shape == (3, 10)
    assert [items.shape for items in fusion.items(fused, vectors, present)] == [(3, 12), (3, 12)]
    changed = vectors | {"price": vectors["price"] + 1}
    assert not torch.allclose(fusion(changed, present), fused)


def test_absent_vectors_do_not_matter_and_are_not_zeros_to_the_model(fusion):
    vectors, present = features()
    present = present | {"text": torch.tensor([False, True, True])}
    noise = vectors | {"text": torch.cat([torch.full((1, 6), 9.0), vectors["text"][1:]])}
    torch.testing.assert_close(fusion(noise, present), fusion(vectors, present))
    torch.nn.init.ones_(fusion.absent["text"])
    assert not torch.allclose(fusion(vectors, present)[0], fusion(vectors, present | {"text": torch.ones(3).bool()})[0])


def test_item_space_starts_as_the_similarity_of_the_frozen_vectors():
    fusion = ItemFusion({"text": 6}, fusion_width=8, token_width=10)
    vectors, present = features()
    items, _ = fusion.items(fusion(vectors, present), vectors, present)
    torch.testing.assert_close(items, vectors["text"])
    absent, _ = fusion.items(fusion(vectors, present), vectors, {"text": torch.zeros(3, dtype=torch.bool)})
    torch.testing.assert_close(absent, torch.zeros(3, 6))


def test_an_item_of_a_history_may_have_another_vector_than_as_a_candidate():
    fusion = ItemFusion({"id": 4, "id_history": 4, "text": 6}, fusion_width=8, token_width=10)
    assert fusion.item_width == 10
    vectors, present = features()
    vectors |= {"id_history": torch.randn(3, 4)}
    present |= {"id_history": present["id"]}
    candidates, as_history = fusion.items(fusion(vectors, present), vectors, present)
    torch.testing.assert_close(candidates, torch.cat([vectors["id"], vectors["text"]], dim=-1))
    torch.testing.assert_close(as_history, torch.cat([vectors["id_history"], vectors["text"]], dim=-1))


def test_a_low_rank_item_space_starts_near_the_similarity_of_the_frozen_vectors():
    """R keeps inner products in expectation, with an error of about 1 / √d; candidates and what is copied share it."""
    torch.manual_seed(0)
    widths = {"id": 64, "id_history": 64, "text": 192}
    fusion = ItemFusion(widths, fusion_width=8, token_width=10, item_dimension=2048)
    vectors = {name: torch.nn.functional.normalize(torch.randn(5, width), dim=-1) for name, width in widths.items()}
    present = {name: torch.ones(5, dtype=torch.bool) for name in widths}
    candidates, as_history = fusion.items(fusion(vectors, present), vectors, present)
    assert (fusion.item_width, as_history.shape) == (2048, (5, 256))
    wide = torch.cat([vectors["id"], vectors["text"]], dim=-1)
    torch.testing.assert_close(candidates @ candidates.T, wide @ wide.T, atol=0.15, rtol=0)
    torch.testing.assert_close(fusion.place(as_history) @ candidates.T, as_history @ wide.T, atol=0.15, rtol=0)


def test_history_embedding_tells_counts_days_and_behaviours_apart():
    embedding = HistoryEmbedding(num_behaviors=2, width=4, scale=1.0)
    base = embedding(torch.tensor([[1]]), torch.tensor([[2.0]]), torch.tensor([[1]]))
    for counts, days, behavior in ((5, 2.0, 1), (1, 80.0, 1), (1, 2.0, 2), (1, 2.0, 0)):
        assert not torch.allclose(
            embedding(torch.tensor([[counts]]), torch.tensor([[days]]), torch.tensor([[behavior]])), base
        )
    torch.testing.assert_close(embedding(torch.tensor([[1]]), torch.tensor([[2.5]]), torch.tensor([[1]])), base)


def test_the_habit_prior_prefers_what_is_had_often_and_lately():
    habit = HistoryEmbedding(num_behaviors=1, width=4, scale=1.0).habit(
        torch.tensor([[1, 7, 7, 60]]), torch.tensor([[2.0, 2.0, 272.0, 0.5]])
    )
    year = np.log(2) / 365
    expected = [-2 * year, np.log(7) - 2 * year, np.log(7) - 272 * year, np.log(60) - 0.5 * year]
    torch.testing.assert_close(habit, torch.tensor([expected], dtype=torch.float32))


def test_frozen_vectors_get_no_gradient_and_do_not_change(new_model, table_dir, tables):
    def digest():
        return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(table_dir.glob("*.npy")))).hexdigest()

    before = digest()
    items = new_model.builder.reader.read(tables.item_ids[:5])
    frozen = list(items["vectors"].values())
    new_model.model.item_vectors(items).sum().backward()
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in frozen)
    optimised = {weight.data_ptr() for weight in new_model.model.parameters()}
    assert not optimised & {tensor.data_ptr() for tensor in frozen}
    torch.optim.SGD(new_model.model.parameters(), lr=1.0).step()
    assert digest() == before
    assert not ItemTable.open(table_dir).modalities["text"].vectors.flags.writeable
