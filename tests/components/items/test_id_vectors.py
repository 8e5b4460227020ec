"""ID vectors: what comes after an instant changes nothing, and one model can read those of both instants."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from components.config import FeaturesConfig, ItemsConfig, SplitConfig
from components.items.id_network import IdNetwork, ItemContent
from components.items.id_vectors import IdVectors, ItemVectors, learn_id_vectors, side_by_side
from components.schemas.events import EVENTS
from tests.worlds.tables import event_row, write

Vectors = npt.NDArray[np.float32]


def ignore(name: str, step: int, steps: int, loss: float) -> None:
    pass


@pytest.fixture
def features() -> FeaturesConfig:
    split = SplitConfig.model_validate({"kind": "leave_one_out", "recent_cuts": 2})
    return FeaturesConfig.model_validate({"split": split.model_dump(exclude_none=True), "min_item_events": 0})


def write_sequences(folder: Path, features: FeaturesConfig, num_users: int, item: Callable[[int, int], int]) -> Path:
    """Eight events of every user, a day apart; the item is that of user and place."""
    end = features.split.end
    rows = [
        event_row(f"{user}-{place}", item(user, place), end - timedelta(days=8 - place, hours=-1), user_id=str(user))
        for user in range(num_users)
        for place in range(8)
    ]
    return write(folder / "part.parquet", EVENTS, rows).parent


def write_walks(folder: Path, features: FeaturesConfig, num_users: int) -> ItemContent:
    """Every user walks up through 20 items without content, from any of them."""
    write_sequences(folder, features, num_users, lambda user, place: (user + place) % 20)
    return ItemContent(np.zeros((20, 2), np.float32), np.zeros((20, 2), np.int64))


def test_what_happens_at_or_after_the_instant_changes_nothing(tmp_path: Path, features: FeaturesConfig) -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(10, 21)  # the last one is never had
    content = ItemContent(rng.normal(size=(11, 4)).astype(np.float32), rng.integers(3, size=(11, 2)))
    config = ItemsConfig(id_dimension=6, id_max_steps=5)

    def know(name: str, changed: set[int]) -> IdVectors:
        def item(user: int, place: int) -> int:
            return int(ids[rng.integers(5)] if place in changed else ids[(user * 7 + place * 3) % 10])

        events = write_sequences(tmp_path / name, features, 12, item)
        return learn_id_vectors(events, ids, content, features, config, 0, ignore)

    first, second = know("plain", set()), know("later", {4, 5, 6, 7})  # the last four: recent, held out
    np.testing.assert_array_equal(first.past.candidate, second.past.candidate)
    held_out_changed = know("held out", {6, 7})  # validation and test
    np.testing.assert_array_equal(first.now.candidate, held_out_changed.now.candidate)
    np.testing.assert_array_equal(first.past.history, second.past.history)
    assert not np.allclose(first.now.candidate, second.now.candidate)


def test_vectors_of_the_two_instants_are_alike(tmp_path: Path, features: FeaturesConfig) -> None:
    content, config = write_walks(tmp_path, features, num_users=200), ItemsConfig(id_dimension=16, id_epochs=60)
    known = learn_id_vectors(tmp_path, np.arange(20), content, features, config, 0, ignore)
    for role in ("candidate", "history"):
        first, second = getattr(known.past, role), getattr(known.now, role)
        cosine = (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
        assert np.median(cosine) > 0.9


def test_no_part_of_the_training_repeats_the_random_draws_of_another(
    tmp_path: Path, features: FeaturesConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_walks(tmp_path, features, num_users=20)
    draws: list[bytes] = []
    compute = IdNetwork.loss

    def watch(self: IdNetwork, history: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        draws.append(torch.get_rng_state().numpy().tobytes() + rest[2].numpy().tobytes())  # dropout; negatives
        return compute(self, history, *rest)

    monkeypatch.setattr(IdNetwork, "loss", watch)
    learn_id_vectors(tmp_path, np.arange(20), content, features, ItemsConfig(id_dimension=4, id_epochs=4), 0, ignore)
    assert len(draws) > 3
    assert len(set(draws)) == len(draws)


def score_each(vectors: ItemVectors, members: int) -> list[Vectors]:
    """Scores [n, n] of every item for a history of every other, by each of the members."""
    histories = np.split(vectors.history, members, axis=1)
    candidates = np.split(vectors.candidate, members, axis=1)
    return [members * history @ candidate.T for history, candidate in zip(histories, candidates, strict=True)]


def test_an_ensemble_scores_as_the_mean_of_its_members(tmp_path: Path, features: FeaturesConfig) -> None:
    content = write_walks(tmp_path, features, num_users=20)
    heard: list[str] = []

    def learn(**settings: int) -> IdVectors:
        config = ItemsConfig(id_dimension=8, id_epochs=120, **settings)  # enough of them to be reported
        return learn_id_vectors(
            tmp_path, np.arange(20), content, features, config, 0, lambda name, *step: heard.append(name)
        )

    alone = learn()
    heard.clear()
    both = learn(id_ensemble=2)
    assert set(heard) == {f"{part}, {member} of 2" for part in ("shared", "past", "now") for member in (1, 2)}
    for one, two in ((alone.past, both.past), (alone.now, both.now)):
        assert two.candidate.shape == two.history.shape == (20, 16)
        first, second = score_each(two, 2)
        np.testing.assert_allclose(first, score_each(one, 1)[0], atol=1e-5)
        assert np.corrcoef(first.ravel(), second.ravel())[0, 1] < 0.999  # another training, not the same again
        np.testing.assert_allclose(two.history @ two.candidate.T, (first + second) / 2, atol=1e-5)
        assert np.sqrt((two.candidate**2).sum(axis=1).mean()) == pytest.approx(1, abs=1e-4)


def test_vectors_of_one_training_are_not_copied() -> None:
    member = ItemVectors(np.ones((3, 2), np.float32), np.ones((3, 2), np.float32), np.ones(3, bool))
    assert side_by_side([member]) is member
