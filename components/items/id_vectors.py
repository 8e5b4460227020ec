"""ID vectors of items from user behaviour, for two points in time.

A model that learns to predict a user's next items must not read vectors computed from these very events: it would trust
them too much, above all for rare items. Leaving out the events of one user is not enough: a recent purchase co-occurs
with fewer events in the log than an old one, so vectors of the whole training window predict its own targets better
than later ones. Vectors for training are therefore learned from events before the newest training cuts, and URM trains
on these cuts only; vectors for inference are learned from the whole training window. See docs/model.md, and
id_network.py for the network.

    as a candidate   x, of a root mean square length of one
    in a history     h, so that h_i · x_j is the score of j for a user whose history is i alone, over URM_SCALE

Two trainings from scratch give vectors with little in common, and no rotation aligns them: most of a rare item's vector
is chance. So both share the first half of their training, on the past and at the full learning rate, and diverge where
the rate begins to fall. One model can then read both.

What is chance in them is another chance in another training, so that the mean of two trainings' scores is better than
either (`items.id_ensemble`). An inner product of vectors side by side is that mean.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from components.config import FeaturesConfig, ItemsConfig
from components.items.cooccurrence import Baskets, Ints, read_baskets
from components.items.id_network import FollowExamples, IdNetwork, ItemContent, follow_examples, train_id_network
from components.memory import trim_memory

Floats = npt.NDArray[np.float32]
Report = Callable[[str, int, int, float], None]

URM_SCALE = 5.0  # the factor that URM's inner products start with
FINAL_RATE = 0.02
ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of n items in both roles."""

    candidate: Floats  # float32 [n, d]
    history: Floats  # float32 [n, d]
    present: npt.NDArray[np.bool_]  # items with behaviour or content [n]; the vectors of the others are zero


@dataclass(frozen=True)
class IdVectors:
    """ID vectors of n items for both points in time."""

    past: ItemVectors  # from events before the newest training cuts, for training
    now: ItemVectors  # from the whole training window, for inference


def learn_id_vectors(
    events: Path,
    item_ids: Ints,
    content: ItemContent,
    features: FeaturesConfig,
    config: ItemsConfig,
    seed: int,
    report: Report,
) -> IdVectors:
    """Learn ID vectors of items, `item_ids` ascending [n], from the folder of the validated events.

    `features` gives the split and the minimum number of events of an item with an ID embedding. `report` is called
    regularly with the name of the training, the step, the number of steps, and the loss.

    Returns:
        Vectors of width `config.id_ensemble` · `config.id_dimension`.
    """
    members = []
    for member in range(config.id_ensemble):
        own_seed = seed if member == 0 else int(np.random.SeedSequence([seed, member]).generate_state(1)[0])
        report_own = _of_member(report, member, config.id_ensemble)
        members.append(_learn_once(events, item_ids, content, features, config, own_seed, report_own))
    return IdVectors(
        past=side_by_side([member.past for member in members]), now=side_by_side([member.now for member in members])
    )


def _of_member(report: Report, member: int, count: int) -> Report:
    if count == 1:
        return report
    return lambda part, step, steps, loss: report(f"{part}, {member + 1} of {count}", step, steps, loss)


def side_by_side(members: Sequence[ItemVectors]) -> ItemVectors:
    """Vectors [n, Σ d] whose inner products are the means of those of the members [n, d], of the same items.

    The root mean square length of candidates stays one.
    """
    if len(members) == 1:
        return members[0]
    share = np.float32(len(members) ** -0.5)
    candidate = np.concatenate([member.candidate for member in members], axis=1) * share
    history = np.concatenate([member.history for member in members], axis=1) * share
    return ItemVectors(candidate, history, members[0].present)


def _learn_once(
    events: Path,
    item_ids: Ints,
    content: ItemContent,
    features: FeaturesConfig,
    config: ItemsConfig,
    seed: int,
    report: Report,
) -> IdVectors:
    """One training of both instants."""
    split = features.split
    # Read again below: two sets of baskets in memory would need twice as much.
    kept = _count(read_baskets(events, item_ids, split, split.validation_start)) >= max(1, features.min_item_events)
    trim_memory()
    shared = IdNetwork(content, kept, config.id_dimension, seed)
    train = partial(train_id_network, max_steps=-(-config.id_max_steps // 2))
    shared_epochs = config.id_epochs // 2
    own_epochs = config.id_epochs - shared_epochs
    # Each part has its own seed: repeated dropout and negatives would be memorised.
    seed_shared, seed_past, seed_now = np.random.SeedSequence(seed).generate_state(3).tolist()

    def finish(name: str, network: IdNetwork, examples: FollowExamples, seed: int) -> ItemVectors:
        network.set_counts(_count(examples.baskets), features.min_item_events)
        train(network, examples, epochs=own_epochs, final_rate=FINAL_RATE, seed=seed, report=partial(report, name))
        return read_vectors(network)

    examples = follow_examples(read_baskets(events, item_ids, split, split.recent_start))
    shared.set_counts(_count(examples.baskets), features.min_item_events)
    train(shared, examples, epochs=shared_epochs, final_rate=1.0, seed=seed_shared, report=partial(report, "shared"))
    content_of_both = {id(shared.text): shared.text, id(shared.attributes): shared.attributes}  # is not copied
    past = finish("past", copy.deepcopy(shared, content_of_both), examples, seed_past)
    del examples
    trim_memory()
    examples = follow_examples(read_baskets(events, item_ids, split, split.validation_start))
    return IdVectors(past, now=finish("now", shared, examples, seed_now))


def _count(baskets: Baskets) -> Floats:
    return np.asarray(baskets.matrix.sum(axis=0), dtype=np.float32)


@torch.no_grad()
def read_vectors(network: IdNetwork) -> ItemVectors:
    """Vectors of all items of a trained network."""
    parts = torch.split(torch.arange(len(network.seen)), ROWS_AT_ONCE)
    history, candidate = (torch.cat([network.vectors(role, part) for part in parts]).numpy() for role in (0, 1))
    present = (network.seen | (network.attributes > 0).any(dim=1) | (network.text != 0).any(dim=1)).numpy()
    # In place: with a million items each copy is a gigabyte.
    history *= present[:, None]
    candidate *= present[:, None]
    squares = np.einsum("nd,nd->n", candidate, candidate)
    length = float(np.sqrt(squares[present].mean())) if present.any() else 1.0
    candidate /= length
    history *= length * float(network.log_scale.exp()) / URM_SCALE
    return ItemVectors(candidate, history, present)
