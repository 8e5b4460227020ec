"""The models of the stage, fitted one after another: rules chosen on validation, networks trained by gradient."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import scipy.sparse as sp
import torch

from components.baseline.batches import Batcher
from components.baseline.data import Dataset
from components.baseline.files import write_network, write_sasrec
from components.baseline.item_knn import ItemKnn
from components.baseline.ranking import Scorer, choose, mean_recall, rank
from components.baseline.rules import OwnHistory, Popularity
from components.baseline.sasrec import SasRecScorer, train_sasrec
from components.baseline.target_attention import TargetAttentionScorer, build_network
from components.baseline.text import Bm25, TextFeatures, TextRetriever, read_text_features
from components.baseline.training import TrainingSummary, train
from components.caches import CachePlace
from components.config import RunConfig
from components.items.cooccurrence import count_pairs, read_baskets, shrunken_cosine

HALF_LIVES_DAYS = (3.0, 30.0, 90.0, 365.0)  # the rules' few settings, chosen on validation
SHRINKAGES = (1.0, 10.0)
BACKWARD = (1.0, 0.5)
BM25_HISTORY_ITEMS = (1, 3, 10)


@dataclass(frozen=True)
class FittedModel:
    """One model, ready to rank."""

    name: str  # in the predictions
    scorer: Scorer
    trials: list[dict[str, float]] = field(default_factory=list)  # of a grid, with their validation_recall, best first
    summary: TrainingSummary | None = None  # of a training by gradient
    output: str = ""  # folder of its files; empty where it has none


@dataclass(frozen=True)
class Fitter:
    """Fits the models that a configuration names."""

    data: Dataset  # what they are fitted on
    config: RunConfig
    output: Path  # folder for the files of the trained ones
    report: Callable[..., None]  # called with a message and figures by name
    # called with a model's name, the step and its metrics while one is trained
    curve: Callable[[str, int, dict[str, float]], None]

    def fit(self, popularity: Popularity, events: Path, item_table: Path, vectors: CachePlace) -> Iterator[FittedModel]:
        """Fit them in the order of the predictions; `popularity` is fitted already, since others start from its counts.

        `events` and `item_table` are the folders of the validated events and of the item table; text vectors of queries
        are cached in `vectors`.
        """
        wanted = self.config.baseline.models
        yield FittedModel("popularity", popularity)
        yield from self._rules(events)
        text = self._read_text(item_table, vectors) if {"text", "target_attention_text"} & set(wanted) else None
        if "bm25" in wanted:
            grid = [{"history_items": float(items)} for items in BM25_HISTORY_ITEMS]
            yield self._choose("bm25", partial(Bm25, self.data), grid)
        if "text" in wanted and text is not None:
            yield self._choose("text", partial(TextRetriever, self.data, text), _half_lives())
        if "sasrec" in wanted:
            yield self._sasrec()
        yield self._target_attention("target_attention", popularity, None)
        if "target_attention_text" in wanted:
            yield self._target_attention("target_attention_text", popularity, text)

    def _rules(self, events: Path) -> Iterator[FittedModel]:
        """Own history and item-kNN."""
        self.report("counting co-occurrence")
        split = self.config.features.split
        baskets = read_baskets(events, self.data.items.ids, split, until=split.validation_start)
        pairs = lru_cache(maxsize=1)(partial(count_pairs, baskets))

        @lru_cache(maxsize=1)
        def similarity(backward: float, shrinkage: float) -> sp.csr_array:
            return shrunken_cosine(pairs(backward), shrinkage)

        def make_item_knn(backward: float, shrinkage: float, half_life_days: float) -> ItemKnn:
            return ItemKnn(self.data, similarity(backward, shrinkage), half_life_days)

        knn_grid = [
            {"backward": backward, "shrinkage": shrinkage} | setting
            for backward in (BACKWARD if baskets.reach else BACKWARD[:1])
            for shrinkage in SHRINKAGES
            for setting in _half_lives()
        ]
        yield self._choose("own_history", partial(OwnHistory, self.data), _half_lives())
        yield self._choose("item_knn", make_item_knn, knn_grid)

    def _choose(self, name: str, make: Callable[..., Scorer], grid: list[dict[str, float]]) -> FittedModel:
        scorer, trials = choose(make, grid, self.data, self.config.evaluation.k)
        self.report(f"{name} chosen", **trials[0])
        return FittedModel(name, scorer, trials)

    def _read_text(self, item_table: Path, vectors: CachePlace) -> TextFeatures:
        def report(done: int, total: int) -> None:
            self.report("encoding the queries", done=done, total=total)

        return read_text_features(self.data, item_table, self.config.items, vectors, report)

    def _sasrec(self) -> FittedModel:
        config, seed, k = self.config.baseline, self.config.seed, self.config.evaluation.k
        torch.manual_seed(seed)
        model, summary = train_sasrec(self.data, config, k=k, seed=seed, log=partial(self.curve, "sasrec"))
        write_sasrec(self.output / "sasrec", model, config)
        return FittedModel("sasrec", SasRecScorer(model, self.data), summary=summary, output="sasrec")

    def _target_attention(self, name: str, popularity: Popularity, text: TextFeatures | None) -> FittedModel:
        """The target-attention network, with frozen text vectors or without."""
        config, seed, k = self.config.baseline, self.config.seed, self.config.evaluation.k
        torch.manual_seed(seed)
        network = build_network(self.data, config, popularity.counts, text.items if text else None)
        batcher = Batcher(self.data, config.history_length, text.queries if text else None)
        summary = train(network, batcher, config, k=k, seed=seed, log=partial(self.curve, name))
        output = "model" if text is None else name
        write_network(self.output / output, network, self.data)
        return FittedModel(name, TargetAttentionScorer(network, batcher), summary=summary, output=output)


def _half_lives() -> list[dict[str, float]]:
    return [{"half_life_days": days} for days in HALF_LIVES_DAYS]


def validate_models(models: Sequence[FittedModel], data: Dataset, k: int) -> dict[str, dict[str, float]]:
    """Validation recall of every model per task and in the mean; trained ones have it from their best step."""
    rows = data.examples.rows("validation")
    return {
        model.name: model.summary.best_recall
        if model.summary
        else mean_recall(rank(model.scorer, data, rows, k), data, k)
        for model in models
    }
