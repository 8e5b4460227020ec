"""Does a model that was trained on other shops recall items of a shop it has never seen?

    python -m benchmarks.transfer --config amazon_toys --run-dir toys --urm others --urm own --output transfer.json

`toys` has the stages ingest, validate, features and encode of the new shop. Each run of `--urm` has a stage sft of a
model that reads text alone (`urm.modalities: [text]`): the new shop has no ID vectors from it and shares no item with
it. Its weights are taken as they are, and its item table is replaced by that of the new shop, whose text vectors come
from the same frozen encoder. Counts of popularity are the new shop's. Every validation example is asked; test examples
are never read.

Beside them stand rivals that need no training by gradient: popularity, item-kNN, and `text`, the text vectors of query
and history, which is what a shop has without a model. Their few settings are chosen on the same validation examples, in
their favour. Differences to `text` and to the first run of `--urm` are per task, with intervals that draw users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.bench import find_run, parse_run, report, write_figures
from benchmarks.paraphrases import fit_rivals, rank_urm
from components.baseline.data import load_dataset
from components.baseline.models import ItemTables
from components.baseline.ranking import find_recall, rank
from components.config import RunConfig
from components.device import choose_device, set_threads
from components.settings import get_settings
from components.studies.ablation.summary import compare_tasks
from components.studies.finished import FinishedRun, hide_progress_bars
from components.urm.data.request import Ids
from components.urm.inference import UrmRecaller
from components.urm.retrieval.exact import ExactIndex

TEXT = "text"
RIVALS = ("popularity", "item_knn", TEXT)


def move(model: Path, item_table: Path, item_ids: Ids, device: str) -> UrmRecaller:
    """A trained model with the items of another shop, all of them candidates.

    Raises:
        DataError: The model reads something of items that the shop's table lacks, or has in another width.
    """
    recaller = UrmRecaller.load(model, item_table, device=device)
    recaller.index = ExactIndex(item_ids, recaller.encode_items(item_ids))
    return recaller


def measure(config: RunConfig, run: FinishedRun, models: Mapping[str, Path]) -> pd.DataFrame:
    """Recall@k on every validation example of a shop: columns model, seed, example_id, user_id, task, recall.

    Args:
        config: Of the shop's run.
        run: The shop's.
        models: Folders of trained models, by name.
    """
    catalogue, contexts, examples = (run.path("features", name) for name in ("catalogue", "contexts", "examples"))
    tables = ItemTables(run.path("encode", "item_table"), run.path("encode", "item_table_past"))
    data = load_dataset(catalogue, run.path("validate", "items"), tables.now, contexts, examples, config.tasks)
    rows, k, found = data.examples.rows("validation"), config.evaluation.k, {}
    untrained = config.model_copy(update={"baseline": config.baseline.model_copy(update={"models": (TEXT,)})})
    with TemporaryDirectory() as folder:
        for name, scorer in fit_rivals(data, untrained, run, tables, Path(folder)):
            if name in RIVALS:
                found[name] = rank(scorer, data, rows, k)
    users = pq.read_table(contexts)
    asked = pq.read_table(examples, filters=pc.field("split") == "validation")
    for name, model in models.items():
        report("asking", model=name)
        recaller = move(model, tables.now, data.items.ids, choose_device(run.settings))
        found[name] = rank_urm(recaller, config, data, asked, users)
    user_ids = np.array(users["user_id"].to_pylist())
    tasks = np.array([task.name for task in config.tasks])
    frames = [
        pd.DataFrame(
            {
                "model": name,
                "seed": config.seed,
                "example_id": data.examples.ids[ranking.rows],
                "user_id": user_ids[data.examples.contexts[ranking.rows]],
                "task": tasks[data.examples.tasks[ranking.rows]],
                "recall": find_recall(ranking, data, k),
            }
        )
        for name, ranking in found.items()
    ]
    return pd.concat(frames, ignore_index=True)


def summarise(recalls: pd.DataFrame, first: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Recall of each model by task and in the mean, of what `measure` returns, and its differences to two of them.

    Returns:
        By the model that stands against it, `text` or the first one, and then by model: figures of `compare_tasks`.
    """
    parts = {str(model): of_model for model, of_model in recalls.groupby("model", sort=False)}
    return {
        against: {model: compare_tasks(of_model, parts[against], seed) for model, of_model in parts.items()}
        for against in (TEXT, first)
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = parse_run(__doc__)
    parser.add_argument("--urm", action="append", required=True, metavar="RUN_DIR", help="May be repeated")
    options, settings = parser.parse_args(arguments), get_settings()
    set_threads(settings)
    hide_progress_bars()
    config, run = find_run(options, settings)
    runs = {name: FinishedRun(settings.find_run_dir(name), settings) for name in options.urm}
    recalls = measure(config, run, {name: urm.path("sft", "model") for name, urm in runs.items()})
    figures = summarise(recalls, first=next(iter(runs)))
    for against, models in figures.items():
        for model, by_task in models.items():
            cells = [
                f"{task} {found['recall']:.3f} {found['difference']:+.3f} ({found['low']:+.3f} … {found['high']:+.3f})"
                for task, found in by_task.items()
            ]
            print(f"{model} minus {against}", *cells, sep=" | ", flush=True)
    write_figures(options.output, {"config": config.name, "k": config.evaluation.k, "minus": figures})


if __name__ == "__main__":
    main()
