"""The models of the stage, fitted one after another: rules chosen on validation, networks trained by gradient."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from components.baseline.batches import Batcher
from components.baseline.bm25f import Bm25f, Fields
from components.baseline.calibration import calibrate_tasks
from components.baseline.category_rule import CategoryRule
from components.baseline.data import Dataset, Ints
from components.baseline.files import write_network, write_sasrec
from components.baseline.id_vectors import IdVectors, read_ids
from components.baseline.item_knn import ItemKnn
from components.baseline.mix import HistoryMix, SearchMix
from components.baseline.query_match import QueryMatcher
from components.baseline.ranking import ByQuery, Chosen, Scorer, choose, mean_recall, rank
from components.baseline.rules import OwnHistory, Popularity
from components.baseline.sasrec import SasRec, SasRecScorer, train_sasrec
from components.baseline.target_attention import Frozen, TargetAttentionScorer, build_network
from components.baseline.text import TextFeatures, TextRetriever, read_text_features
from components.baseline.training import LogFunction, TrainingSummary, train
from components.caches import CachePlace
from components.config import RunConfig
from components.items.calibration import name_by_task
from components.items.cooccurrence import count_pairs, read_baskets, shrunken_cosine

Settings = dict[str, float]

HALF_LIVES_DAYS = (1.0, 3.0, 30.0, 90.0, 365.0)  # the rules' few settings, chosen on validation
SHRINKAGES = (1.0, 10.0)
BACKWARD = (1.0, 0.5)
FIELD_WEIGHTS = {"title": (1.0,), "category": (0.0, 0.3, 1.0, 3.0, 10.0), "brand": (0.0, 1.0)}
BM25F_HISTORY_ITEMS = (1.0, 3.0, 10.0)
ID_GRID = {"age_decay": (0.5, 1.0, 1.5), "popularity": (0.0, 0.25, 0.5, 1.0)}
MIX_GRID = {"text_share": (0.0, 0.02, 0.05, 0.1, 0.25), "decay": (0.4, 0.55, 0.7, 0.85)}
SEARCH_MIX_GRID = {
    "query_text": (0.0, 0.05, 0.2),
    "query_words": (0.03, 0.1, 0.3, 1.0, 3.0),
    "query_category": (0.0, 0.3, 1.0, 3.0),
}


class ItemTables(NamedTuple):
    """Folders of the item tables."""

    now: Path  # from the whole training window
    past: Path  # from before the newest training cuts


@dataclass(frozen=True)
class FittedModel:
    """One model, ready to rank."""

    name: str  # in the predictions
    scorer: Scorer
    # what was chosen → the settings of its grid with their validation_recall, best first
    trials: Mapping[str, list[Settings]] = field(default_factory=dict)
    summary: TrainingSummary | None = None  # of a training by gradient
    output: str = ""  # folder of its files; empty where it has none


@dataclass(frozen=True)
class Fitter:
    """Fits the models that a configuration names."""

    data: Dataset  # what they are fitted on
    config: RunConfig
    output: Path  # folder for the files of the trained ones
    scratch: Path  # folder for what is mapped while they are fitted
    report: Callable[..., None]  # called with a message and figures by name
    # called with a model's name, the step and its metrics while one is trained
    curve: Callable[[str, int, dict[str, float]], None]

    def fit(
        self, popularity: Popularity, events: Path, tables: ItemTables, vectors: CachePlace
    ) -> Iterator[FittedModel]:
        """Fit them in the order of the predictions; `popularity` is fitted already.

        `events` is the folder of the validated events; text vectors of queries are cached in `vectors`.
        """
        wanted = set(self.config.baseline.models)
        yield FittedModel("popularity", popularity)
        own_history, trials = self._choose("own_history", partial(OwnHistory, self.data), _half_lives())
        yield FittedModel("own_history", own_history, trials)
        neighbours, trials = self._item_knn(events)
        yield FittedModel("item_knn", neighbours, trials)
        text = self._read_text(tables.now, vectors) if {"text", "mix", "target_attention_text"} & wanted else None
        if "category_rule" in wanted:
            make_rule = partial(CategoryRule, self.data, neighbours, popularity)
            category_rule, trials = self._choose("category_rule", make_rule, _grid({"leaf_only": (0.0, 1.0)}))
            yield FittedModel("category_rule", category_rule, trials)
        if "id_vectors" in wanted:
            yield self._id_vectors(tables.now)
        yield from self._retrievers(neighbours, text)
        if "sasrec" in wanted:
            yield self._sasrec()
        yield self._target_attention("target_attention", tables, None)
        if "target_attention_text" in wanted:
            yield self._target_attention("target_attention_text", tables, text)

    def _item_knn(self, events: Path) -> tuple[ItemKnn, Mapping[str, list[Settings]]]:
        self.report("counting co-occurrence")
        split = self.config.features.split
        baskets = read_baskets(events, self.data.items.ids, split, until=split.validation_start)
        pairs = lru_cache(maxsize=1)(partial(count_pairs, baskets, folder=self.scratch))

        @lru_cache(maxsize=1)
        def similarity(backward: float, shrinkage: float) -> sp.csr_array:
            return shrunken_cosine(pairs(backward), shrinkage, self.scratch)

        def make(backward: float, shrinkage: float, half_life_days: float) -> ItemKnn:
            return ItemKnn(self.data, similarity(backward, shrinkage), half_life_days)

        backward = BACKWARD if baskets.reach else BACKWARD[:1]
        grid = _grid({"backward": backward, "shrinkage": SHRINKAGES, "half_life_days": HALF_LIVES_DAYS})
        return self._choose("item_knn", make, grid)

    def _id_vectors(self, item_table: Path) -> FittedModel:
        window_days = self.config.features.split.window / timedelta(days=1)
        make = partial(IdVectors, self.data, read_ids(item_table, self.data.items.ids), window_days)
        scorer, trials = self._choose("id_vectors", make, _grid(ID_GRID))
        return FittedModel("id_vectors", scorer, trials)

    def _retrievers(self, neighbours: ItemKnn, text: TextFeatures | None) -> Iterator[FittedModel]:
        """What reads words or texts: one setting for examples with a query, one for those without."""
        wanted = set(self.config.baseline.models)
        rows = self.data.examples.rows("validation")
        asked = self.data.examples.query[rows] >= 0
        if {"bm25f", "mix"} & wanted:
            fields = Fields(self.data.items)

            def make(history_items: float = 1, **weights: float) -> Bm25f:
                return Bm25f(self.data, fields, weights, history_items)

            words, trials = self._choose("bm25f.query", make, _grid(FIELD_WEIGHTS), rows[asked])
            if "bm25f" in wanted:
                grid = _grid(FIELD_WEIGHTS | {"history_items": BM25F_HISTORY_ITEMS})
                of_history, more = self._choose("bm25f.history", make, grid, rows[~asked])
                yield FittedModel("bm25f", ByQuery(self.data, words, of_history), {**trials, **more})
        if text is not None and "text" in wanted:
            retriever, trials = self._choose("text", partial(TextRetriever, self.data, text), _half_lives())
            yield FittedModel("text", retriever, trials)
        if text is not None and "mix" in wanted:
            make_mix = partial(HistoryMix, self.data, text, neighbours.similarity)
            history, trials = self._choose("mix.history", make_mix, _grid(MIX_GRID), rows[~asked])
            make_search = partial(SearchMix, history, words, text)
            search, more = self._choose("mix.query", make_search, _grid(SEARCH_MIX_GRID), rows[asked])
            yield FittedModel("mix", ByQuery(self.data, search, history), {**trials, **more})

    def _choose(
        self, name: str, make: Callable[..., Chosen], grid: list[Settings], rows: Ints | None = None
    ) -> tuple[Chosen, Mapping[str, list[Settings]]]:
        """The best setting on validation, and its trials under the name."""
        scorer, trials = choose(make, grid, self.data, self.config.evaluation.k, rows=rows)
        if trials:
            self.report(f"{name} chosen", **trials[0])
        return scorer, {name: trials}

    def _read_text(self, item_table: Path, vectors: CachePlace) -> TextFeatures:
        def report(done: int, total: int) -> None:
            self.report("encoding the queries", done=done, total=total)

        return read_text_features(self.data, item_table, self.config.items, vectors, report)

    def _sasrec(self) -> FittedModel:
        model, summary = train_sequences(self.data, self.config, partial(self.curve, "sasrec"))
        write_sasrec(self.output / "sasrec", model, self.config.baseline)
        return FittedModel("sasrec", SasRecScorer(model, self.data), summary=summary, output="sasrec")

    def _target_attention(self, name: str, tables: ItemTables, text: TextFeatures | None) -> FittedModel:
        """The target-attention network, with frozen text vectors or without."""
        scorer, summary = train_target_attention(self.data, self.config, tables, text, partial(self.curve, name))
        output = "model" if text is None else name
        write_network(self.output / output, scorer.network, self.data)
        return FittedModel(name, scorer, summary=summary, output=output)


def train_sequences(data: Dataset, config: RunConfig, log: LogFunction) -> tuple[SasRec, TrainingSummary]:
    """SASRec by the settings of a run."""
    torch.manual_seed(config.seed)
    return train_sasrec(data, config.baseline, k=config.evaluation.k, seed=config.seed, log=log)


def train_target_attention(
    data: Dataset,
    config: RunConfig,
    tables: ItemTables,
    text: TextFeatures | None,
    log: LogFunction,
) -> tuple[TargetAttentionScorer, TrainingSummary]:
    """Target attention by the settings of a run, with frozen text vectors or without."""
    settings = config.baseline
    ids, past = (
        np.concatenate(read_ids(table, data.items.ids)[:2], axis=1) if settings.id_vectors else None
        for table in (tables.now, tables.past)
    )
    frozen = Frozen(text.items if text else None, ids, past)
    torch.manual_seed(config.seed)
    network = build_network(data, settings, frozen)
    matcher = QueryMatcher(data) if settings.field_matches else None
    batcher = Batcher(data, settings.history_length, text.queries if text else None, matcher)
    summary = train(network, batcher, settings, k=config.evaluation.k, seed=config.seed, log=log)
    calibrations = calibrate_tasks(network, batcher, config.evaluation.k)
    summary.calibrated_recall = {task: calibration.recall for task, calibration in calibrations.items()}
    log(summary.steps, name_by_task(calibrations))
    return TargetAttentionScorer(network, batcher), summary


def _half_lives() -> list[Settings]:
    return _grid({"half_life_days": HALF_LIVES_DAYS})


def _grid(values: Mapping[str, Sequence[float]]) -> list[Settings]:
    """Every combination of the values."""
    return [dict(zip(values, setting, strict=True)) for setting in itertools.product(*values.values())]


def validate_models(models: Sequence[FittedModel], data: Dataset, k: int) -> dict[str, dict[str, float]]:
    """Validation recall of every model per task and in the mean; trained ones have it from their best step."""
    rows = data.examples.rows("validation")
    return {
        model.name: model.summary.best_recall
        if model.summary
        else mean_recall(rank(model.scorer, data, rows, k), data, k)
        for model in models
    }
