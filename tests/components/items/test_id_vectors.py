"""ID vectors: what comes after an instant changes nothing, and one model can read those of both instants."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components.config import FeaturesConfig, ItemsConfig, SplitConfig
from components.items.id_network import IdNetwork, ItemContent
from components.items.id_vectors import LearnedItems, learn_id_vectors
from components.schemas.events import EVENTS


def ignore(name: str, step: int, steps: int, loss: float) -> None:
    pass


def write_walks(folder: Path, num_users: int) -> tuple[FeaturesConfig, ItemContent]:
    """Every user walks up through 20 items without content, from any of them."""
    split = SplitConfig.model_validate({"kind": "leave_one_out", "recent_cuts": 2})
    rows = [
        {"event_id": f"{user}-{place}", "user_id": str(user), "behavior": "purchase", "scenario": "web",
         "item_id": (user + place) % 20, "query": None, "ts": split.end - timedelta(days=8 - place, hours=-1),
         "attributes": []}
        for user in range(num_users) for place in range(8)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=EVENTS), folder / "part.parquet")
    features = FeaturesConfig.model_validate({"split": split.model_dump(exclude_none=True), "min_item_events": 0})
    return features, ItemContent(np.zeros((20, 2), np.float32), np.zeros((20, 2), np.int64))


def test_what_happens_at_or_after_the_instant_changes_nothing(tmp_path: Path) -> None:
    split = SplitConfig.model_validate({"kind": "leave_one_out", "recent_cuts": 2})
    features = FeaturesConfig.model_validate({"split": split.model_dump(exclude_none=True), "min_item_events": 0})
    rng = np.random.default_rng(0)
    ids = np.arange(10, 21)  # the last one is never had
    content = ItemContent(rng.normal(size=(11, 4)).astype(np.float32), rng.integers(3, size=(11, 2)))
    config = ItemsConfig(id_dimension=6, id_max_steps=5)

    def write(name: str, changed: set[int]) -> Path:
        rows = [
            {"event_id": f"{user}-{place}", "user_id": str(user), "behavior": "purchase", "scenario": "web",
             "item_id": int(ids[rng.integers(5)] if place in changed else ids[(user * 7 + place * 3) % 10]),
             "query": None, "ts": split.end - timedelta(days=8 - place, hours=-1), "attributes": []}
            for user in range(12) for place in range(8)
        ]  # fmt: skip
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=EVENTS), tmp_path / name / "part.parquet")
        return tmp_path / name

    def know(events: Path) -> LearnedItems:
        return learn_id_vectors(events, ids, content, features, config, 0, ignore)

    plain, later_changed = write("plain", set()), write("later", {4, 5, 6, 7})  # the last four: recent, held out
    first, second = know(plain), know(later_changed)
    np.testing.assert_array_equal(first.past.candidate, second.past.candidate)
    held_out_changed = know(write("held out", {6, 7}))  # validation and test
    np.testing.assert_array_equal(first.now.candidate, held_out_changed.now.candidate)
    np.testing.assert_array_equal(first.past.history, second.past.history)
    assert not np.allclose(first.now.candidate, second.now.candidate)


def test_vectors_of_the_two_instants_are_alike(tmp_path: Path) -> None:
    features, content = write_walks(tmp_path, num_users=200)
    known = learn_id_vectors(
        tmp_path, np.arange(20), content, features, ItemsConfig(id_dimension=16, id_epochs=60), 0, ignore
    )
    for role in ("candidate", "history"):
        first, second = getattr(known.past, role), getattr(known.now, role)
        cosine = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
        assert np.median(cosine) > 0.9


def test_no_part_of_the_training_repeats_the_random_draws_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, content = write_walks(tmp_path, num_users=20)
    draws: list[bytes] = []
    compute = IdNetwork.loss

    def watch(self: IdNetwork, history: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        draws.append(torch.get_rng_state().numpy().tobytes() + rest[2].numpy().tobytes())  # dropout; negatives
        return compute(self, history, *rest)

    monkeypatch.setattr(IdNetwork, "loss", watch)
    learn_id_vectors(tmp_path, np.arange(20), content, features, ItemsConfig(id_dimension=4, id_epochs=4), 0, ignore)
    assert len(draws) > 3
    assert len(set(draws)) == len(draws)
