"""The user head: popularity by its logarithm, and words of a query by field."""

from typing import Any

import pytest
import torch

from components.items.id_scores import AGE_DECAY
from components.items.id_vectors import URM_SCALE
from components.items.ramps import num_ramps, ramp_features
from components.urm.network.heads import (
    DOUBT_SCALE,
    FIRST_COPY_GAIN,
    FIRST_MEANING_GAIN,
    FIRST_NAME_GAIN,
    FIRST_POPULARITY_GAINS,
    POPULARITY_RAMPS,
    HeadInputs,
    UserHead,
    spread_copy_scores,
)

WIDTH, WIDTHS = 8, {"id": 4, "lexical": 6, "brand": 3, "category_words": 2}


def ask(
    head: UserHead, hidden: torch.Tensor, task: torch.Tensor, prompts: tuple[int, int], **given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """User vectors and copy scores; what is not given is zero, of this number of prompts and places in a history."""
    values = {
        "rows": torch.zeros(len(hidden), dtype=torch.long),
        "tokens": torch.zeros(*prompts, WIDTH),
        "habit": torch.zeros(prompts),
        "items": torch.zeros(*prompts, sum(WIDTHS.values())),
        "ids": torch.zeros(*prompts, WIDTHS["id"]),
        "kinds": torch.zeros(prompts[0], 0),
        "known": torch.zeros(prompts, dtype=torch.bool),
        "queries": torch.zeros(len(hidden), 8),
        "meanings": torch.zeros(len(hidden), 2 * len(head.meanings)),
        "doubts": torch.zeros(len(hidden), 2),
        "named": torch.zeros(len(hidden), len(head.kind_columns)),
        "place": lambda wide: wide,
    }
    with torch.no_grad():
        return head(HeadInputs(hidden=hidden, task=task, **values | given))


def user_vectors(head: UserHead, queries: torch.Tensor) -> torch.Tensor:
    """Of two examples with random hidden states and no history."""
    generator = torch.Generator().manual_seed(0)
    hidden, task = torch.randn(2, 3, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)
    vectors, own = ask(head, hidden, task, (1, 1), queries=queries)
    assert not own.any()
    return vectors


def test_before_training_popularity_counts_by_its_logarithm() -> None:
    vectors = user_vectors(UserHead(WIDTH, WIDTHS, 3, 4), torch.zeros(2, 8))
    log_counts = torch.log1p(torch.tensor([[0.0, 5.0, 9.0], [2.0, 0.0, 9.0], [40.0, 7.0, 9.0]]))
    scores = vectors[..., -num_ramps(3, POPULARITY_RAMPS) :] @ ramp_features(log_counts, POPULARITY_RAMPS).T
    in_all, recent = FIRST_POPULARITY_GAINS
    expected = in_all * log_counts[:, 0] + recent * log_counts[:, 1]  # and nothing of the third
    torch.testing.assert_close(scores, expected.expand_as(scores))


@pytest.mark.parametrize(("field", "place"), [("lexical", slice(4, 10)), ("category_words", slice(13, 15))])
def test_a_querys_words_reach_the_part_of_their_field_by_its_own_gain(field: str, place: slice) -> None:
    head = UserHead(WIDTH, WIDTHS, 1, 4)
    queries = torch.zeros(2, 8)
    queries[1] = torch.arange(1.0, 9.0)
    said = queries[1, :6] if field == "lexical" else queries[1, 6:]
    before = user_vectors(head, queries)
    torch.testing.assert_close(before[1, 0, place], 5.0 * 2.0 * said)
    assert not before[0, :, place].any()
    with torch.no_grad():
        first = len(WIDTHS) + 2  # behind the modalities' gains, that of exact copies, and the decay
        head.gains.bias[first + (field == "category_words")] *= 3
    after = user_vectors(head, queries)
    torch.testing.assert_close(after[1, :, place], 3 * before[1, :, place])
    other = slice(13, 15) if field == "lexical" else slice(4, 10)
    torch.testing.assert_close(after[1, :, other], before[1, :, other])


def test_doubt_takes_words_away_and_leaves_the_meaning() -> None:
    head = UserHead(WIDTH, WIDTHS, 1, 4, meaning=True)
    said = {"queries": torch.arange(1.0, 9.0)[None], "meanings": torch.tensor([[3.0, 4.0]])}
    hidden, task = torch.ones(1, 3, WIDTH), torch.ones(1, WIDTH)

    def vectors(lexical: float, category_words: float) -> torch.Tensor:
        doubts = torch.tensor([[lexical, category_words]])
        return ask(head, hidden, task, (1, 1), doubts=doubts, **said)[0][0, 0]

    torch.testing.assert_close(vectors(0.25, 1)[4:10], 0.75 * URM_SCALE * 2.0 * said["queries"][0, :6])
    torch.testing.assert_close(vectors(0.25, 1)[13:15], URM_SCALE * FIRST_MEANING_GAIN * said["meanings"][0])
    with torch.no_grad():
        head.doubt.weight[head.gain_rows("meaning"), 1] = (
            0.3  # the gain of the meaning by the doubt about words of categories
        )
    grown = FIRST_MEANING_GAIN + 0.3 * DOUBT_SCALE
    torch.testing.assert_close(vectors(0, 1)[13:15], URM_SCALE * grown * said["meanings"][0])


def test_kinds_of_the_history_count_by_level_and_not_before_training() -> None:
    widths = WIDTHS | {"category_0": 2, "category_1": 3}
    head = UserHead(WIDTH, widths, 1, 4)
    counts = torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.5], [3.0, 0.0, 0.0, 4.0, 0.0]])
    given = {"items": torch.zeros(2, 1, sum(widths.values())), "rows": torch.tensor([1, 0]), "kinds": counts}

    def vectors() -> torch.Tensor:
        return ask(head, torch.ones(2, 3, WIDTH), torch.ones(2, WIDTH), (2, 1), **given)[0]

    untrained = vectors()
    assert not untrained[..., 15:20].any()
    with torch.no_grad():
        head.gains.bias[head.gain_rows("kinds")] = torch.tensor([0.5, -2.0])
    change = (vectors() - untrained)[:, 0] / URM_SCALE
    torch.testing.assert_close(change[:, 15:17], 0.5 * counts[[1, 0], :2])
    torch.testing.assert_close(change[:, 17:20], -2.0 * counts[[1, 0], 2:])
    assert not change[:, :15].any()


def test_kinds_that_the_query_names_are_copied_by_level_and_by_no_model_from_before() -> None:
    widths = WIDTHS | {"category_0": 2, "category_1": 3}
    named = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    given = {"items": torch.zeros(1, 1, sum(widths.values())), "kinds": torch.zeros(1, 5)}

    def kinds(head: UserHead) -> torch.Tensor:
        vectors = ask(head, torch.ones(2, 3, WIDTH), torch.ones(2, WIDTH), (1, 1), named=named, **given)[0]
        return vectors[:, 0, 15:20] / URM_SCALE

    assert not kinds(UserHead(WIDTH, widths, 1, 4)).any()
    head = UserHead(WIDTH, widths, 1, 4, names=True)
    torch.testing.assert_close(kinds(head), FIRST_NAME_GAIN * named)
    with torch.no_grad():
        head.gains.bias[head.gain_rows("named")] = torch.tensor([0.5, 3.0])
    torch.testing.assert_close(kinds(head), torch.tensor([0.5, 0.5, 3.0, 3.0, 3.0]) * named)


def test_what_id_vectors_alone_say_is_added_by_task_to_their_part() -> None:
    generator = torch.Generator().manual_seed(1)
    head, text, ids = UserHead(WIDTH, {"text": 2} | WIDTHS, 1, 4, id_scores=True), slice(0, 2), slice(2, 6)
    given = {"ids": torch.randn(2, 3, 4, generator=generator), "items": torch.zeros(2, 3, 17)}
    given |= {"known": torch.tensor([[True, True, True], [False, False, False]]), "rows": torch.tensor([0, 0, 1])}
    task = torch.randn(2, WIDTH, generator=generator)[[0, 1, 1]]

    def vectors() -> torch.Tensor:
        return ask(head, torch.ones(3, 2, WIDTH), task, (2, 3), **given)[0]

    before = vectors()
    head.shift_id_scores(task[:2], torch.tensor([0, 1]), torch.tensor([0.5, 2.0]))
    change = (vectors() - before) / URM_SCALE
    weights = torch.tensor([1.0, 2.0, 3.0]) ** -AGE_DECAY
    user = (weights / weights.sum()) @ given["ids"][0]
    torch.testing.assert_close(change[0, :, ids], 0.5 * user.expand(2, -1))
    torch.testing.assert_close(change[1, :, ids], 2.0 * user.expand(2, -1))
    assert not change[2].any(), "an empty history says nothing"
    assert not change[..., text].any()
    assert not change[..., 6:].any()


def test_an_empty_history_copies_nothing_whatever_its_padding_points_at() -> None:
    head = UserHead(WIDTH, WIDTHS, 1, 4)

    def vectors(item: float) -> torch.Tensor:
        items = torch.full((1, 2, sum(WIDTHS.values())), item)
        return ask(head, torch.ones(1, 3, WIDTH), torch.ones(1, WIDTH), (1, 2), items=items)[0]

    torch.testing.assert_close(vectors(1.0), vectors(0.0), rtol=0, atol=0)


def test_a_model_without_words_takes_queries_of_no_width() -> None:
    head = UserHead(WIDTH, {"id": 4, "brand": 11}, 1, 4)
    assert user_vectors(head, torch.zeros(2, 0)).shape == (2, 3, 15 + num_ramps(1, POPULARITY_RAMPS))


def test_copy_scores_are_gain_times_softplus_of_the_match_and_zero_for_unknown_places() -> None:
    head, generator = UserHead(WIDTH, WIDTHS, 1, 4), torch.Generator().manual_seed(1)
    habit = torch.tensor([[0.3, -1.2, 2.0], [0.0, 0.5, 9.0]])
    known = torch.tensor([[True, True, True], [True, True, False]])
    with torch.no_grad():
        head.query.weight.zero_()  # the match is the habit alone
        head.query.bias.zero_()
        head.key.weight[-1].zero_()
    hidden, task = torch.randn(3, 2, WIDTH, generator=generator), torch.randn(3, WIDTH, generator=generator)
    tokens = torch.randn(2, 3, WIDTH, generator=generator)
    _, own = ask(head, hidden, task, (2, 3), rows=torch.tensor([0, 1, 1]), tokens=tokens, habit=habit, known=known)
    expected = FIRST_COPY_GAIN * torch.nn.functional.softplus(habit) * known
    torch.testing.assert_close(own, expected[[0, 1, 1]])


def test_without_copies_history_and_query_reach_user_vectors_through_hidden_states_alone() -> None:
    head, generator = UserHead(WIDTH, WIDTHS, 1, 4, copy_path=False), torch.Generator().manual_seed(1)
    torch.nn.init.normal_(head.project.weight, generator=generator)

    def output(hidden: torch.Tensor, prompt: float) -> tuple[torch.Tensor, torch.Tensor]:
        widths = {"tokens": (WIDTH,), "habit": (), "items": (sum(WIDTHS.values()),)}
        given = {name: torch.full((1, 3, *width), prompt) for name, width in widths.items()}
        given |= {"known": torch.ones(1, 3, dtype=torch.bool), "queries": torch.full((1, 8), prompt)}
        return ask(head, hidden, torch.ones(1, WIDTH), (1, 3), **given)

    one, other = (torch.randn(1, 2, WIDTH, generator=generator) for _ in range(2))
    vectors, own = output(one, 1.0)
    torch.testing.assert_close(output(one, 2.0)[0], vectors, rtol=0, atol=0)
    assert not own.any()
    changed = (output(other, 1.0)[0] - vectors)[..., : sum(WIDTHS.values())]
    assert changed.abs().max() > 0.1


def test_copy_scores_spread_to_their_items_and_padding_adds_nothing() -> None:
    own, places = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), torch.tensor([[4, 1, 0], [2, 0, 0]])
    expected = torch.tensor([[0.0, 2.0, 0.0, 0.0, 1.0], [0.0, 0.0, 3.0, 0.0, 0.0]])
    torch.testing.assert_close(spread_copy_scores(own, places, 5), expected)


def test_a_low_rank_user_vector_is_the_map_of_what_is_copied() -> None:
    generator = torch.Generator().manual_seed(2)
    width = sum(WIDTHS.values())
    given = {
        "tokens": torch.randn(1, 3, WIDTH, generator=generator),
        "items": torch.randn(1, 3, width, generator=generator),
        "known": torch.ones(1, 3, dtype=torch.bool),
        "queries": torch.randn(1, 8, generator=generator),
    }
    hidden, task = torch.randn(1, 2, WIDTH, generator=generator), torch.randn(1, WIDTH, generator=generator)
    reduce = torch.nn.Linear(width, 4, bias=False)
    vectors = []
    for options, place in (({}, lambda wide: wide), ({"item_width": 4}, reduce)):
        head = UserHead(WIDTH, WIDTHS, 1, 4, **options)
        for weight in (*head.query.parameters(), *head.key_hidden.parameters(), *head.key.parameters()):
            torch.nn.init.constant_(weight, 0.1)
        vectors.append(ask(head, hidden, task, (1, 3), place=place, **given)[0])
    wide, low = vectors
    torch.testing.assert_close(low[..., :4], reduce(wide[..., :width]).detach())
    torch.testing.assert_close(low[..., 4:], wide[..., width:])


def test_alone_w_starts_at_the_length_of_an_item_and_reaches_the_hidden_states() -> None:
    """From zero, no gradient would pass W h, and under `max` the H vectors would share every target."""
    torch.manual_seed(0)
    for copy_path, low, high in ((True, 0.0, 0.0), (False, 0.8, 1.2)):
        head = UserHead(64, {"id": 256, "text": 256}, 1, 4, copy_path=copy_path)
        hidden, task = torch.randn(8, 3, 64, requires_grad=True), torch.randn(8, 64)
        given = {"tokens": torch.zeros(8, 1, 64), "items": torch.zeros(8, 1, 512), "habit": torch.zeros(8, 1)}
        given |= {"known": torch.zeros(8, 1, dtype=torch.bool), "queries": torch.zeros(8, 0)}
        given |= {"meanings": torch.zeros(8, 0), "doubts": torch.zeros(8, 2), "kinds": torch.zeros(8, 0)}
        given |= {"named": torch.zeros(8, 0), "ids": torch.zeros(8, 1, 256)}
        rows = torch.arange(8)
        vectors, _ = head(HeadInputs(hidden=hidden, task=task, rows=rows, place=lambda wide: wide, **given))
        lengths = vectors[..., :512].detach().norm(dim=-1) / URM_SCALE
        assert low <= float(lengths.min()) <= float(lengths.max()) <= high
        (gradient,) = torch.autograd.grad(vectors[..., :512].sum(), hidden)
        assert bool(gradient.any()) is not copy_path
