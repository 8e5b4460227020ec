"""Recall of the rivals that need no training by gradient, on examples of a finished run.

    python -m benchmarks.rules --config amazon_sports --run-dir default --output rules.json

needs the stages ingest, validate, features and encode of the run. The rivals are those of `baseline.models` that are
not trained. Their settings are chosen on validation, as the stage `baseline` chooses them; `--split test` asks the test
examples. Recall@k per task (k of the configuration), the mean over examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.bench import find_run, parse_run, report, write_figures
from components.baseline.data import Dataset, load_dataset
from components.baseline.models import FittedModel, Fitter, ItemTables
from components.baseline.ranking import mean_recall, rank
from components.baseline.rules import Popularity
from components.caches import CachePlace
from components.config import RunConfig
from components.device import set_threads
from components.settings import get_settings
from components.studies.finished import FinishedRun

WITHOUT_TRAINING = ("category_rule", "id_vectors", "bm25f", "text", "mix")


def fit_rules(
    data: Dataset, config: RunConfig, run: FinishedRun, tables: ItemTables, folder: Path
) -> Iterator[FittedModel]:
    """Those of `baseline.models` that need no training by gradient, and what is always fitted before them."""
    models = tuple(model for model in config.baseline.models if model in WITHOUT_TRAINING)
    config = config.model_copy(update={"baseline": config.baseline.model_copy(update={"models": models})})
    fitter = Fitter(data, config, folder, folder, report, lambda *_: None)
    left = {"item_knn", *models}  # popularity and own history come before it
    vectors = CachePlace.of(run.settings) / "vectors"
    for model in fitter.fit(Popularity(data), run.path("validate", "events"), tables, vectors):
        yield model
        left.discard(model.name)
        if not left:
            return  # the next one would train target attention


def measure(config: RunConfig, run: FinishedRun, split: str) -> dict[str, dict[str, float]]:
    """Recall@k of each model named on the examples of a split, by task and in the mean over tasks."""
    tables = ItemTables(run.path("encode", "item_table"), run.path("encode", "item_table_past"))
    catalogue, contexts, examples = (run.path("features", name) for name in ("catalogue", "contexts", "examples"))
    data = load_dataset(catalogue, run.path("validate", "items"), tables.now, contexts, examples, config.tasks)
    rows, k, found = data.examples.rows(split), config.evaluation.k, {}
    with TemporaryDirectory() as folder:
        for model in fit_rules(data, config, run, tables, Path(folder)):
            if model.name in config.baseline.models:
                found[model.name] = mean_recall(rank(model.scorer, data, rows, k), data, k)
                report(model.name, **found[model.name])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = parse_run(__doc__)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    options, settings = parser.parse_args(arguments), get_settings()
    set_threads(settings)
    config, run = find_run(options, settings)
    recalls = measure(config, run, options.split)
    write_figures(
        options.output, {"config": config.name, "split": options.split, "k": config.evaluation.k, "recall": recalls}
    )


if __name__ == "__main__":
    main()
