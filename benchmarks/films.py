"""Does a language model know films? Which of several equally popular ones a viewer goes on to like, by titles alone.

    pip download --no-deps recbole==1.2.1 && unzip recbole-*.whl 'recbole/dataset_example/ml-100k/*'
    python -m benchmarks.films --data recbole/dataset_example/ml-100k --output films.json

Nothing is trained on. A viewer's last liked film (rating of 4 or 5) stands among 20 that the viewer never rated, of
those nearest to it in the number of other viewers who like them; known are the eight films liked before. The figure is
the AUC, the share of the 20 that the target beats, mean over viewers.

- `pretrained`: the backbone at full depth, log P(title | the eight titles), by the method chosen. `random weights`: the
  same network untrained, by the same method.
- `text encoder`: the mean cosine of the title with the eight titles.
- `genres`: the mean share of genres in common (Jaccard), the field that a shop would have.
- `viewers`: the mean cosine of the columns of likes, without those of the viewer; what behaviour knows.
- Mixtures: mean z-score over the candidates.

Methods are chosen on viewers of even numbers; the figures are of the others. Intervals draw viewers. `rare` are targets
with at most 20 other viewers, `other words` those that share no word of four letters with the eight titles.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.bench import mean_with_interval, open_packaged, write_figures
from components.exceptions import DataError
from components.items.text import TextEncoder
from components.items.words import split_words
from components.settings import Settings
from components.studies.abilities.association import TOKENS, Rate, rate_by_language_model, standardise
from components.studies.abilities.likelihood import open_language_model

HISTORY, NEGATIVES, LIKED, RARE = 8, 20, 4, 20
LONG_WORD = 4  # letters
CHOICE_VIEWERS = 200
SHOWN = 50  # viewers between two reports of progress
TEMPLATES = (
    "A viewer liked these films: {films}. The viewer also liked",
    "Films for the same taste: {films},",
    "If you like {films}, then you will love",
)
ANY = "many different films"
ALL = "all templates"
PRETRAINED, RANDOM, ENCODER, GENRES, VIEWERS = "pretrained", "random weights", "text encoder", "genres", "viewers"
MIXTURES = ((GENRES, PRETRAINED), (VIEWERS, GENRES), (VIEWERS, GENRES, ENCODER), (VIEWERS, GENRES, PRETRAINED))
CONTRASTS = (
    (PRETRAINED, RANDOM),
    (PRETRAINED, ENCODER),
    (PRETRAINED, GENRES),
    (f"{GENRES} + {PRETRAINED}", GENRES),
    (f"{VIEWERS} + {GENRES} + {PRETRAINED}", f"{VIEWERS} + {GENRES}"),
    (f"{VIEWERS} + {GENRES} + {ENCODER}", f"{VIEWERS} + {GENRES}"),
)
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Films:
    """Films, and who likes them."""

    titles: Sequence[str]
    genres: Sequence[frozenset[str]]
    liked: npt.NDArray[np.bool_]  # [viewers, films]

    @property
    def fans(self) -> Rows:
        """Viewers who like each film, [films]."""
        return np.asarray(self.liked.sum(axis=0), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Cases:
    """One viewer a row."""

    viewers: Rows  # [cases]
    histories: Rows  # films liked before, [cases, 8]
    candidates: Rows  # the target first, [cases, 21]

    def take(self, chosen: npt.NDArray[np.bool_]) -> Cases:
        """Some of them."""
        return Cases(self.viewers[chosen], self.histories[chosen], self.candidates[chosen])


def read_films(folder: Path, seed: int = 0) -> tuple[Films, Cases]:
    """Films and cases of MovieLens-100K, in the files of RecBole.

    Raises:
        DataError: A file is missing.
    """
    paths = [folder / f"ml-100k.{kind}" for kind in ("item", "inter")]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"films {path}", expected="a file", got="none", remedy="see python -m benchmarks.films --help"
            )
    items, ratings = (pd.read_csv(path, sep="\t").rename(columns=lambda name: name.split(":")[0]) for path in paths)
    items = items.drop_duplicates(["movie_title", "release_year"])
    ratings = ratings[ratings["item_id"].isin(items["item_id"])].sort_values(["timestamp", "item_id"], kind="stable")
    places = pd.Series(np.arange(len(items)), index=items["item_id"])
    rows, viewers = places[ratings["item_id"]].to_numpy(), ratings["user_id"].to_numpy() - 1
    likes = ratings["rating"].to_numpy() >= LIKED
    rated, liked = np.zeros((2, viewers.max() + 1, len(items)), dtype=np.bool_)
    rated[viewers, rows] = True
    liked[viewers[likes], rows[likes]] = True
    films = Films(
        titles=tuple(map(read_title, items["movie_title"])),
        genres=tuple(frozenset(str(names).split()) for names in items["class"]),
        liked=liked,
    )
    order = {int(viewer): rows[likes & (viewers == viewer)] for viewer in np.unique(viewers)}
    return films, make_cases(films.fans, rated, order, seed)


def read_title(text: str) -> str:
    """`Usual Suspects, The (Les …)` as one says it, `The Usual Suspects`."""
    plain = re.sub(r"\s*\(.*", "", text).strip() or text
    return re.sub(r"^(.*), (The|A|An)$", r"\2 \1", plain)


def make_cases(fans: Rows, rated: npt.NDArray[np.bool_], order: Mapping[int, Rows], seed: int) -> Cases:
    """A case for each viewer with enough liked films, `order` their liked films in order of time."""
    random = np.random.default_rng(seed)
    made = []
    for viewer, films in order.items():
        if len(films) <= HISTORY:
            continue
        *history, target = films[-HISTORY - 1 :]
        unknown = np.flatnonzero(~rated[viewer])
        distance = np.abs(fans[unknown] - (fans[target] - 1)) + random.random(len(unknown))  # equals in any order
        made.append((viewer, history, [target, *unknown[np.argsort(distance)[:NEGATIVES]]]))
    viewers, histories, candidates = (np.array(column, dtype=np.int64) for column in zip(*made, strict=True))
    return Cases(viewers, histories, candidates)


def score_by_titles(films: Films, cases: Cases, rate: Rate, template: str) -> dict[str, Floats]:
    """What a model says of the candidates' titles after the titles of the history, by each way to add up tokens."""

    def ask(known: str, rows: Rows) -> dict[str, Floats]:
        tokens = rate(template.replace("{films}", known), [films.titles[row] for row in rows])
        return {name: add(tokens) for name, add in TOKENS.items()}

    every = np.unique(cases.candidates)
    plain = ask(ANY, every)
    scores = {
        f"{name}, {against}": np.zeros(cases.candidates.shape) for name in TOKENS for against in ("plain", "more")
    }
    for case, (history, candidates) in enumerate(zip(cases.histories, cases.candidates, strict=True)):
        for name, found in ask(", ".join(films.titles[row] for row in history), candidates).items():
            scores[f"{name}, plain"][case] = found
            scores[f"{name}, more"][case] = found - plain[name][np.searchsorted(every, candidates)]
        if (case + 1) % SHOWN == 0:
            print(f"{template}: {case + 1} of {len(cases.viewers)} viewers", file=sys.stderr, flush=True)
    return scores


def score_all(films: Films, cases: Cases, rate: Rate, templates: Sequence[str] = TEMPLATES) -> dict[str, Floats]:
    """Scores by every method over the templates."""
    single = {template: score_by_titles(films, cases, rate, template) for template in templates}
    scores = {f"{template} | {way}": found for template, ways in single.items() for way, found in ways.items()}
    for way in next(iter(single.values())):
        scores[f"{ALL} | {way}"] = mix([ways[way] for ways in single.values()])
    return scores


def score_by_encoder(films: Films, cases: Cases, encoder: TextEncoder) -> Floats:
    """Mean cosine of titles."""
    vectors = encoder.encode(list(films.titles)).astype(np.float64)
    found: Floats = np.einsum("cnd,chd->cn", vectors[cases.candidates], vectors[cases.histories]) / HISTORY
    return found


def score_by_genres(films: Films, cases: Cases) -> Floats:
    """Mean share of genres in common."""

    @cache
    def share(one: int, other: int) -> float:
        first, second = films.genres[one], films.genres[other]
        return len(first & second) / len(first | second)

    pairs = zip(cases.histories.tolist(), cases.candidates.tolist(), strict=True)
    return np.array([[np.mean([share(film, row) for film in history]) for row in rows] for history, rows in pairs])


def score_by_viewers(films: Films, cases: Cases) -> Floats:
    """Mean cosine of the columns of likes, as if the viewer had liked nothing."""
    scores = np.zeros(cases.candidates.shape)
    for case, (viewer, history, rows) in enumerate(zip(cases.viewers, cases.histories, cases.candidates, strict=True)):
        others = np.delete(films.liked, viewer, axis=0).astype(np.float64)
        sizes = np.maximum(others.sum(axis=0), 1)
        together = others[:, rows].T @ others[:, history]
        scores[case] = (together / np.sqrt(np.outer(sizes[rows], sizes[history]))).mean(axis=1)
    return scores


def mix(members: Sequence[Floats]) -> Floats:
    """Mean z-score over the candidates of each case."""
    mean: Floats = np.mean([standardise(member) for member in members], axis=0)
    return mean


def measure(scores: Floats) -> Floats:
    """Share of the others that the target beats, half of those with an equal score, [cases]."""
    target, others = scores[:, :1], scores[:, 1:]
    shares: Floats = ((target > others) + 0.5 * (target == others)).mean(axis=1)
    return shares


def groups_of(films: Films, cases: Cases) -> dict[str, npt.NDArray[np.bool_]]:
    """All cases, those of rare targets, and those of targets that share no long word with the history."""
    words = [{word for word in split_words(title) if len(word) >= LONG_WORD} for title in films.titles]
    targets = cases.candidates[:, 0]
    shared = [
        any(words[target] & words[film] for film in history)
        for target, history in zip(targets, cases.histories, strict=True)
    ]
    return {
        "all": np.ones(len(targets), dtype=np.bool_),
        "rare": films.fans[targets] - 1 <= RARE,
        "other words": ~np.array(shared, dtype=np.bool_),
    }


def summarise(films: Films, cases: Cases, scores: Mapping[str, Floats], seed: int = 0) -> dict[str, Any]:
    """Mean AUC of each model and differences, with intervals, for each group of cases."""
    values = {name: measure(of_model) for name, of_model in scores.items()}

    def summarise_group(members: npt.NDArray[np.bool_]) -> dict[str, Any]:
        def interval(of_cases: Floats) -> dict[str, float]:
            return mean_with_interval(of_cases[members], seed)

        return {
            "viewers": int(members.sum()),
            "auc": {name: interval(of_model) for name, of_model in values.items()},
            "differences": {f"{one} - {other}": interval(values[one] - values[other]) for one, other in CONTRASTS},
        }

    return {name: summarise_group(members) for name, members in groups_of(films, cases).items() if members.any()}


def study(films: Films, cases: Cases, settings: Settings, backbone: str, encoder: TextEncoder) -> dict[str, Any]:
    """Choose a method on some viewers, and compare the models on the others."""
    choice = cases.take((cases.viewers % 2 == 0) & (np.cumsum(cases.viewers % 2 == 0) <= CHOICE_VIEWERS))
    report = cases.take(cases.viewers % 2 == 1)
    model = open_language_model(settings, backbone, None)
    looks = {
        method: float(measure(scores).mean())
        for method, scores in score_all(films, choice, rate_by_language_model(model)).items()
    }
    chosen = max(looks, key=lambda method: looks[method])
    templates = [template for template in TEMPLATES if chosen.startswith((template, ALL))]
    scores = {PRETRAINED: score_all(films, report, rate_by_language_model(model), templates)[chosen]}
    del model
    model = open_language_model(settings, backbone, 0)
    scores[RANDOM] = score_all(films, report, rate_by_language_model(model), templates)[chosen]
    scores |= {
        ENCODER: score_by_encoder(films, report, encoder),
        GENRES: score_by_genres(films, report),
        VIEWERS: score_by_viewers(films, report),
        "popularity": films.fans[report.candidates] - np.eye(1, NEGATIVES + 1),  # without the viewer's own
    }
    scores |= {" + ".join(names): mix([scores[name] for name in names]) for names in MIXTURES}
    return {"chosen": chosen, "auc_of_the_choice": looks} | summarise(films, report, scores)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the figures."""
    models = open_packaged(__doc__, "ml-100k.item and ml-100k.inter", arguments)
    films, cases = read_films(models.data)
    write_figures(models.output, study(films, cases, models.settings, models.backbone, models.encoder))


if __name__ == "__main__":
    main()
