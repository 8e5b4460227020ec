"""Does a model understand a query that names its category in other words, as a shopper might?

    python -m benchmarks.paraphrases --config amazon_beauty --run-dir default --output paraphrases.json

needs the stages ingest, validate, features and encode of the run, and sft of each run of `--urm` (by default the run
itself). `configs/paraphrases/` has the phrases; none shares a word with the category's name. Every validation
example that asks for one of these categories is asked in three forms: without a query, in the category's own words,
and in each phrase. Nothing is trained on the phrases. Rivals are those of `baseline.models` that need no training by
gradient; their settings are chosen on validation, on the category queries in their own words and the examples without
a query. With the models `category_rule` and `text` there are two rules more, which take a query that names no category
for the nearest one by sentence vectors: that of the nearest name, or of most of the nearest items. Test examples are
never ranked. The intervals draw categories.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks.bench import find_run, parse_run, report, write_figures
from benchmarks.rules import fit_rules
from components.baseline.category_rule import CategoryRule
from components.baseline.data import Dataset, find, load_dataset
from components.baseline.models import ItemTables
from components.baseline.ranking import Ranking, Scorer, find_recall, rank
from components.baseline.text import TextFeatures, read_text_features
from components.caches import CachePlace
from components.config import RunConfig
from components.device import set_threads
from components.evaluation.predict import predict_urm
from components.exceptions import ConfigError
from components.items.text import TextEncoder, encode_texts
from components.items.words import split_words
from components.schemas.examples import EXAMPLES
from components.settings import get_settings
from components.studies.finished import FinishedRun
from components.urm.data.meaning import NEAREST_ITEMS
from components.urm.inference import UrmRecaller

NO_QUERY, OWN_WORDS, OTHER_WORDS = "no query", "own words", "other words"
FORMS = (NO_QUERY, OWN_WORDS, OTHER_WORDS)
DRAWS = 2000

Phrases = Mapping[str, Sequence[str]]


def read_phrases(path: Path) -> Phrases:
    """Phrases by category.

    Raises:
        ConfigError: There is no such file, or a phrase has a word of its category's name.
    """
    if not path.exists():
        raise ConfigError(f"file {path}", expected="phrases by category", got="no file", remedy="write one")
    phrases: dict[str, list[str]] = yaml.safe_load(path.read_text())
    for category, of_category in phrases.items():
        for phrase in of_category:
            if shared := _stems(category) & _stems(phrase):
                raise ConfigError(
                    f"phrase {phrase!r} of {path}",
                    expected=f"no word of {category!r}",
                    got=", ".join(sorted(shared)),
                    remedy="write it in other words",
                )
    return phrases


def _stems(text: str) -> set[str]:
    return {word.removesuffix("s") for word in split_words(text)}


@dataclass(frozen=True)
class Questions:
    """Examples in every form."""

    table: pa.Table  # in the schema EXAMPLES
    forms: npt.NDArray[Any]  # form of each, shape [E]
    categories: npt.NDArray[Any]  # what is asked for, shape [E]


def ask(examples: pa.Table, phrases: Phrases, searches: Sequence[str], plain: str) -> Questions:
    """The examples that ask for one of the categories, in every form, with ids of their own.

    Args:
        examples: In the schema EXAMPLES.
        phrases: By category.
        searches: Tasks whose query is a category.
        plain: Task without a query, for the form without.
    """
    rows, forms, categories = [], [], []
    for row in examples.to_pylist():
        if row["task"] not in searches or row["query"] not in phrases:
            continue
        asked = [(NO_QUERY, plain, None), (OWN_WORDS, row["task"], row["query"])]
        asked += [(OTHER_WORDS, row["task"], phrase) for phrase in phrases[row["query"]]]
        for form, task, query in asked:
            rows.append(row | {"example_id": len(rows), "split": "test", "task": task, "query": query})
            forms.append(form)
            categories.append(row["query"])
    return Questions(pa.Table.from_pylist(rows, EXAMPLES), np.array(forms), np.array(categories))


def fit_rivals(
    data: Dataset, config: RunConfig, run: FinishedRun, tables: ItemTables, folder: Path
) -> Iterator[tuple[str, Scorer]]:
    """The rivals that need no training by gradient."""
    vectors = CachePlace.of(run.settings) / "vectors"
    for model in fit_rules(data, config, run, tables, folder):
        yield model.name, model.scorer
        if isinstance(model.scorer, CategoryRule) and "text" in config.baseline.models:
            text = read_text_features(data, tables.now, config.items, vectors)
            names = sorted({path[-1] for path in data.items.categories if path})
            encoder = TextEncoder(config.items.text_encoder, torch.device("cpu"), config.items.batch_size)
            by_name = encode_texts(names, encoder, vectors).vectors.astype(np.float32)
            nearest = [names[best] for best in (text.queries @ by_name.T).argmax(axis=1)]
            yield "category rule, nearest name", _rule_of(model.scorer, data, nearest)
            yield "category rule, nearest items", _rule_of(model.scorer, data, nearest_by_items(data, text))


def nearest_by_items(data: Dataset, text: TextFeatures) -> list[str]:
    """Leaf category of most of the items whose texts are nearest to each query; of equal ones that of the nearest."""
    with_category = np.array([bool(path) for path in data.items.categories])
    similarity = np.where(text.present & with_category, text.queries @ text.items.T, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :NEAREST_ITEMS]
    leaves = [[data.items.categories[item][-1] for item in items] for items in order]
    return [Counter(of_query).most_common(1)[0][0] for of_query in leaves]


def _rule_of(rule: CategoryRule, data: Dataset, nearest: Sequence[str]) -> CategoryRule:
    """The rule for queries that name a leaf category, and the nearest one for all others."""
    named = {tuple(split_words(path[-1])) for path in data.items.categories if path}
    queries = tuple(
        query if tuple(split_words(query)) in named else name
        for query, name in zip(data.examples.queries, nearest, strict=True)
    )
    understood = replace(data, examples=replace(data.examples, queries=queries))
    return CategoryRule(understood, rule.neighbours, rule.popularity, leaf_only=1.0)


def rank_urm(
    recaller: UrmRecaller, config: RunConfig, data: Dataset, examples: pa.Table, contexts: pa.Table
) -> Ranking:
    """URM on examples in the schema EXAMPLES."""
    predictions = predict_urm(recaller, config, examples, contexts, config.evaluation.k, report)
    items = np.full((len(predictions), config.evaluation.k), -1, dtype=np.int64)
    for row, ids in enumerate(predictions["item_ids"]):
        items[row, : len(ids)] = find(data.items.ids, ids.values.to_numpy())
    rows = find(data.examples.ids, predictions["example_id"].to_numpy())
    return Ranking(rows, items, np.zeros(items.shape, np.float32))


def summarise(recalls: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Mean recall of each model by form, and what other words bring, with intervals over categories.

    Args:
        recalls: Columns model, form, category and recall, one row per question.
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    categories = sorted(recalls["category"].unique())
    chosen = np.random.default_rng(seed).multinomial(len(categories), [1 / len(categories)] * len(categories), draws)
    summary: dict[str, dict[str, Any]] = {}
    for model, of_model in recalls.groupby("model", sort=False):
        sums = of_model.pivot_table(index="category", columns="form", values="recall", aggfunc=["sum", "count"])
        sums = sums.reindex(categories)
        means = {form: chosen @ sums["sum"][form] / (chosen @ sums["count"][form]) for form in FORMS}
        gain = np.quantile(means[OTHER_WORDS] - means[NO_QUERY], [0.025, 0.975])
        point = of_model.groupby("form")["recall"].mean()
        summary[str(model)] = {
            "recall": {form: float(point[form]) for form in FORMS},
            "interval": {form: np.quantile(means[form], [0.025, 0.975]).tolist() for form in FORMS},
            "gain_of_other_words": float(point[OTHER_WORDS] - point[NO_QUERY]),
            "gain_interval": gain.tolist(),
        }
    return summary


def measure(config: RunConfig, run: FinishedRun, urm_runs: Mapping[str, FinishedRun], phrases: Phrases) -> pd.DataFrame:
    """Recall@k of every model on every question: columns model, form, category, seen and recall."""
    searches = [task for task in config.tasks if task.target.query_category_level is not None]
    plain = next(task.name for task in config.tasks if not task.needs_query)
    contexts, examples = (pq.read_table(run.path("features", name)) for name in ("contexts", "examples"))
    validation = examples.filter(pc.field("split") == "validation")
    names = [task.name for task in searches]
    asked = ask(validation, phrases, names, plain)
    tables = ItemTables(run.path("encode", "item_table"), run.path("encode", "item_table_past"))
    known = examples.filter(pc.field("split") != "test")
    others = known.filter(pc.is_in(known.column("task"), pa.array([*names, plain])))
    offset = asked.table.num_rows
    ids = pa.array(np.arange(offset, offset + others.num_rows))
    others = others.set_column(others.schema.get_field_index("example_id"), EXAMPLES.field("example_id"), ids)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "examples.parquet"
        pq.write_table(pa.concat_tables([asked.table, others.cast(EXAMPLES)]), path)
        catalogue, of_items = run.path("features", "catalogue"), run.path("validate", "items")
        data = load_dataset(catalogue, of_items, tables.now, run.path("features", "contexts"), path, config.tasks)
        rows, k, found = data.examples.rows("test"), config.evaluation.k, {}
        for name, scorer in fit_rivals(data, config, run, tables, Path(folder)):
            found[name] = rank(scorer, data, rows, k)
    for name, urm_run in urm_runs.items():
        print("asking", name, flush=True)
        found[name] = rank_urm(urm_run.recaller(), config, data, asked.table, contexts)
    held_out = {task.name for task in searches if task.target.held_out_query}
    unseen = {row["query"] for row in validation.to_pylist() if row["task"] in held_out}
    frames = []
    for name, ranking in found.items():
        place = data.examples.ids[ranking.rows]
        columns = {"model": name, "form": asked.forms[place], "category": asked.categories[place]}
        seen = [category not in unseen for category in columns["category"]]
        frames.append(pd.DataFrame(columns | {"seen": seen, "recall": find_recall(ranking, data, k)}))
    return pd.concat(frames)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = parse_run(__doc__)
    parser.add_argument("--urm", action="append", default=[], metavar="RUN_DIR", help="Of a stage sft; may be repeated")
    options, settings = parser.parse_args(arguments), get_settings()
    set_threads(settings)
    config, run = find_run(options, settings)
    phrases = read_phrases(settings.configs_dir / "paraphrases" / f"{config.name}.yaml")
    runs = {
        _name(path): FinishedRun(settings.find_run_dir(path), settings) for path in options.urm or [options.run_dir]
    }
    recalls = measure(config, run, runs, phrases)
    parts = {"all": recalls, "known": recalls[recalls["seen"]], "held out": recalls[~recalls["seen"]]}
    figures: dict[str, Any] = {"config": config.name, "k": config.evaluation.k}
    for part, frame in parts.items():
        counts = frame[frame["model"] == frame["model"].iloc[0]]
        figures[part] = {
            "categories": int(counts["category"].nunique()),
            "questions": {form: int((counts["form"] == form).sum()) for form in FORMS},
            "models": summarise(frame),
        }
        print_table(part, figures[part]["models"])
    write_figures(options.output, figures)


def _name(run_dir: str) -> str:
    return f"urm ({Path(run_dir).name})"


def print_table(part: str, models: Mapping[str, Mapping[str, Any]]) -> None:
    """One line per model."""
    print(part, *FORMS, "other words minus no query (95 %)", sep=" | ")
    for name, figures in models.items():
        low, high = figures["gain_interval"]
        values = [f"{figures['recall'][form]:.3f}" for form in FORMS]
        print(name, *values, f"{figures['gain_of_other_words']:+.3f} ({low:+.3f} … {high:+.3f})", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
