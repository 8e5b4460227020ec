"""Who knows which product a query wants: words, a sentence encoder, or a language model? On graded judgments.

    python -m benchmarks.graded_queries --data chorus_icecat --output graded.json

The folder holds products.parquet (item_id, title, brand, short_description) and judgments.parquet (query, item_id,
rating from 0 to 3), as querqy/chorus publishes them. Nothing is trained, and there are no users. Each model orders the
judged products of a query. The figure is NDCG@10 with gains 2^rating - 1, mean over queries whose ratings differ;
products without a judgment are left out, since nothing is known of them.

- `words`: BM25F over title, brand and description, weights chosen.
- `text encoder`: cosine of the query with the title, or with title and description, as chosen.
- `pretrained`: the backbone at full depth; log P(title | query) - log P(title | any query), log P(query | title), or
  the mean of both as z-scores, as chosen. `random weights`: the same network untrained, by the same method.
- Mixtures: mean z-score of two or three of these. `any order`: the mean over all orders.

Choices are made on every other query, in alphabetical order; the figures are of the others. Intervals draw queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.bench import mean_with_interval, open_packaged, write_figures
from components.baseline.bm25f import Bm25fIndex, Fields
from components.baseline.data import Items
from components.items.text import TextEncoder
from components.items.words import split_words
from components.settings import Settings
from components.studies.abilities.association import standardise
from components.studies.abilities.likelihood import LanguageModel, open_language_model

CUTOFF = 10
BY_TITLE, BY_QUERY, BY_BOTH = "log P(title | query) - log P(title)", "log P(query | title)", "both"
SEARCH, ANY, PRODUCT = "A customer of a shop searched for {query}.", "something", "Best match:"
CHANCE, WORDS, ENCODER = "any order", "words", "text encoder"
PRETRAINED, RANDOM = "pretrained", "random weights"
MIXTURES = ((WORDS, ENCODER), (WORDS, PRETRAINED), (ENCODER, PRETRAINED), (WORDS, ENCODER, PRETRAINED))
Floats = npt.NDArray[np.float64]
Scores = Sequence[Floats]  # of each query's judged products
Score = Callable[["Judged"], Scores]


@dataclass(frozen=True, eq=False)
class Judged:
    """Queries with their judged products."""

    queries: Sequence[str]  # alphabetical, [Q]
    rows: Sequence[npt.NDArray[np.int64]]  # of the products that are judged for each query, in `products`
    ratings: Sequence[npt.NDArray[np.int64]]  # of these, 0 to 3
    products: pd.DataFrame  # title, brand and short_description

    def part(self, half: int) -> Judged:
        """Every other query: the first half serves choices, the second one the report."""
        queries, rows, ratings = (part[half::2] for part in (self.queries, self.rows, self.ratings))
        return replace(self, queries=queries, rows=rows, ratings=ratings)

    @property
    def other_words(self) -> npt.NDArray[np.bool_]:
        """Queries of which no best product has a word in its title, [Q]."""
        titles = [set(split_words(title)) for title in self.products["title"]]
        return np.array(
            [
                not any(set(split_words(query)) & titles[row] for row in rows[ratings == ratings.max()])
                for query, rows, ratings in zip(self.queries, self.rows, self.ratings, strict=True)
            ]
        )


def read_judged(folder: Path) -> Judged:
    """Read the two files; queries with equal ratings alone are left out, since no order of theirs is wrong."""
    products = pd.read_parquet(folder / "products.parquet").fillna({"brand": "", "short_description": ""})
    judgments = pd.read_parquet(folder / "judgments.parquet")
    judgments = judgments[judgments["item_id"].isin(products["item_id"])]
    places = pd.Series(np.arange(len(products)), index=products["item_id"])
    groups = [
        (str(query), places[group["item_id"]].to_numpy(), group["rating"].to_numpy())
        for query, group in judgments.groupby("query", sort=True)
        if group["rating"].nunique() > 1
    ]
    queries, rows, ratings = zip(*groups, strict=True)
    return Judged(queries, rows, ratings, products)


def ndcg(scores: Floats, ratings: npt.NDArray[np.int64], k: int = CUTOFF) -> float:
    """NDCG@k with gains 2^rating - 1; equal scores share their places, so that no order of the file counts."""
    gains = 2.0**ratings - 1
    discounts = 1 / np.log2(np.arange(len(ratings)) + 2)
    discounts[k:] = 0
    _, group = np.unique(-scores, return_inverse=True)
    sizes = np.bincount(group)
    shared = np.add.reduceat(discounts, np.cumsum(sizes) - sizes) / sizes
    return float((gains * shared[group]).sum() / (np.sort(gains)[::-1] * discounts).sum())


def score_by_words(judged: Judged, brand: float, description: float) -> Scores:
    """BM25F; the description stands in the place of the categories, which these products have not."""
    products, nothing = judged.products, np.zeros(len(judged.products))
    items = Items(
        ids=np.arange(len(products)),
        titles=tuple(products["title"]),
        categories=tuple((text,) for text in products["short_description"]),
        brands=tuple(products["brand"]),
        train_events=nothing.astype(np.int64),
        popularity=nothing.astype(np.float32),
        log_counts=np.zeros((len(products), 0), dtype=np.float32),
        features=np.zeros((len(products), 0), dtype=np.int64),
        names=(),
    )
    fields = Fields(items)
    index = Bm25fIndex(fields, {"title": 1.0, "brand": brand, "category": description})
    scores = index.score(fields.count([split_words(query) for query in judged.queries]))
    return [row[rows].astype(np.float64) for row, rows in zip(scores, judged.rows, strict=True)]


def score_by_encoder(judged: Judged, encoder: TextEncoder, with_description: bool) -> Scores:
    """Cosines."""
    products = judged.products
    texts = products["title"] + (". " + products["short_description"] if with_description else "")
    known = sorted({row for rows in judged.rows for row in rows.tolist()})
    vectors = dict(zip(known, encoder.encode([texts.iloc[row] for row in known]).astype(np.float64), strict=True))
    queries = encoder.encode(list(judged.queries)).astype(np.float64)
    return [
        np.stack([vectors[row] for row in rows.tolist()]) @ query
        for rows, query in zip(judged.rows, queries, strict=True)
    ]


def score_by_titles(judged: Judged, model: LanguageModel) -> Scores:
    """What a query adds to the log-likelihood of a title."""

    def rate(query: str, rows: npt.NDArray[np.int64]) -> Floats:
        titles = [f" {judged.products['title'].iloc[row]}" for row in rows]
        prompt = f"{SEARCH.replace('{query}', query)} {PRODUCT}"
        return np.array([float(tokens.sum()) for tokens in model.continuations(prompt, titles)])

    every = np.unique(np.concatenate(judged.rows))
    plain = dict(zip(every.tolist(), rate(ANY, every), strict=True))
    return [
        rate(query, rows) - np.array([plain[row] for row in rows.tolist()])
        for query, rows in zip(judged.queries, judged.rows, strict=True)
    ]


def score_by_queries(judged: Judged, model: LanguageModel) -> Scores:
    """The log-likelihood of the query after a title."""
    scores = [np.zeros(len(rows)) for rows in judged.rows]
    asked: dict[int, list[tuple[int, int]]] = {}
    for query, rows in enumerate(judged.rows):
        for place, row in enumerate(rows.tolist()):
            asked.setdefault(row, []).append((query, place))
    for row, places in asked.items():
        prompt = f"{PRODUCT} {judged.products['title'].iloc[row]}. {SEARCH.partition('{query}')[0].rstrip()}"
        found = model.continuations(prompt, [f" {judged.queries[query]}." for query, _ in places])
        for (query, place), tokens in zip(places, found, strict=True):
            scores[query][place] = float(tokens.sum())
    return scores


def mix(members: Sequence[Scores]) -> Scores:
    """Mean z-score over the products of each query."""
    return [standardise(np.stack(of_query)).mean(axis=0) for of_query in zip(*members, strict=True)]


def methods_of(model: LanguageModel) -> dict[str, Score]:
    """Ways to score by a language model; each scores the same queries once."""
    single: dict[str, Score] = {
        BY_TITLE: cache(partial(score_by_titles, model=model)),
        BY_QUERY: cache(partial(score_by_queries, model=model)),
    }
    return {**single, BY_BOTH: lambda judged: mix([score(judged) for score in single.values()])}


def measure(judged: Judged, scores: Scores) -> Floats:
    """NDCG of every query, [Q]."""
    return np.array([ndcg(row, ratings) for row, ratings in zip(scores, judged.ratings, strict=True)])


def summarise(judged: Judged, scores: Mapping[str, Scores], seed: int = 0) -> dict[str, Any]:
    """Mean NDCG of each model, that of queries in other words, and differences, with intervals."""
    others = judged.other_words
    values = {name: measure(judged, of_model) for name, of_model in scores.items()}
    interval = partial(mean_with_interval, seed=seed)
    return {
        "queries": len(judged.queries),
        "queries_in_other_words": int(others.sum()),
        "ndcg": {name: interval(of_model) for name, of_model in values.items()},
        "in_other_words": {
            name: float(of_model[others].mean()) if others.any() else None for name, of_model in values.items()
        },
        "minus_words": {name: interval(of_model - values[WORDS]) for name, of_model in values.items()},
        "pretrained_minus_random": interval(values[PRETRAINED] - values[RANDOM]),
    }


def study(judged: Judged, settings: Settings, backbone: str, encoder: TextEncoder) -> dict[str, Any]:
    """Choose a method for every model on one half of the queries, and compare them on the other."""
    methods: dict[str, dict[str, Score]] = {
        WORDS: {
            f"brand {brand:g}, description {description:g}": partial(
                score_by_words, brand=brand, description=description
            )
            for brand, description in product((0.0, 1.0), (0.0, 0.3, 1.0, 3.0))
        },
        ENCODER: {
            name: partial(score_by_encoder, encoder=encoder, with_description=with_description)
            for name, with_description in (("title", False), ("title and description", True))
        },
        PRETRAINED: methods_of(open_language_model(settings, backbone, None)),
    }
    choice, report = (judged.part(half) for half in (0, 1))
    looks = {
        name: {method: float(measure(choice, score(choice)).mean()) for method, score in of_model.items()}
        for name, of_model in methods.items()
    }
    chosen = {name: max(of_model, key=lambda method: of_model[method]) for name, of_model in looks.items()}
    scores: dict[str, Scores] = {CHANCE: [np.zeros(len(rows)) for rows in report.rows]}
    scores |= {name: methods[name][method](report) for name, method in chosen.items()}
    del methods[PRETRAINED]
    scores[RANDOM] = methods_of(open_language_model(settings, backbone, 0))[chosen[PRETRAINED]](report)
    scores |= {" + ".join(names): mix([scores[name] for name in names]) for names in MIXTURES}
    return {"chosen": chosen, "ndcg_of_the_choice": looks} | summarise(report, scores)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the figures."""
    models = open_packaged(__doc__, "products.parquet and judgments.parquet", arguments)
    figures = study(read_judged(models.data), models.settings, models.backbone, models.encoder)
    write_figures(models.output, figures)


if __name__ == "__main__":
    main()
