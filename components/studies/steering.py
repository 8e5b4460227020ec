"""Study `steering`: how much guidance shifts the recall towards its categories, and whether it still fits the user.

For each phrase and task, and for the same users: share of the top-K in the phrase's categories with and without the
guidance. The gain is the mean difference over users, with a bootstrap interval over users. For users whose next items
are in these categories there is also the recall of those items without the guidance, with it, and in the guided list of
another such user; the difference to the last measures personalisation. Users come from the validation split; the test
weeks stay untouched.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from rich.table import Table

from components.config import RunConfig, Task, load_document
from components.device import set_threads
from components.evaluation.bootstrap import mean_interval
from components.settings import Settings
from components.storage import StageReport, StageRun
from components.studies.finished import load_recaller
from components.studies.phrases import Phrase, PhraseBook
from components.tracking import track
from components.urm.data.request import Ids, RecallRequest, UserContext, read_contexts
from components.urm.inference import UrmRecaller

NUM_USERS = 100
Shares = npt.NDArray[np.float64]
_VALIDATION = [("split", "=", "validation")]
Asked = tuple[UserContext, Ids]  # a user and next items


def options(settings: Settings, config: RunConfig) -> dict[str, Any]:
    """What decides the result besides code and configuration: the phrases.

    Raises:
        ConfigError: The configuration has no file of phrases, or it has an error.
    """
    content = _read_phrases(settings, config).model_dump_json()
    return {"phrases": hashlib.sha256(content.encode()).hexdigest()}


def run(stage: StageRun) -> StageReport:
    """Measure; the metrics are in result.json, in `steering.json` and in MLflow."""
    set_threads(stage.settings)
    config = stage.config
    book = _read_phrases(stage.settings, config)
    categories = _read_categories(stage)
    contexts = _read_newest(stage)
    users, asked = _choose_users(contexts.values(), config.seed), _read_asked(stage, contexts)
    with track(stage):
        recaller = load_recaller(lambda output: stage.path("sft", output), stage.settings)
        names = dict.fromkeys(task for _, task in book.pairs())
        plain = {name: _recall(recaller, users, config.task(name), config.evaluation.k) for name in names}
        rows: list[dict[str, Any]] = []
        for phrase, name in book.pairs():
            stage.report_progress(f"{name}: {phrase.phrase}", done=len(rows), of=len(list(book.pairs())))
            guided = _recall(recaller, users, config.task(name), config.evaluation.k, phrase.phrase)
            row = compare(phrase, name, users, plain[name], guided, categories, config.seed)
            interested = _choose_interested(asked.get(name, []), phrase, categories)
            rows.append(row | _measure_fit(recaller, interested, config.task(name), config.evaluation.k, phrase.phrase))
        gains = mean_gains(rows)
        metrics = {"k": config.evaluation.k, "users": len(users), "phrases": rows, "mean_gain": gains}
        mlflow.log_table({key: [row[key] for row in rows] for key in rows[0]}, "steering.json")
        mlflow.log_metrics({f"mean_gain.{kind}": value for kind, value in gains.items()})
    (stage.output / "steering.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return StageReport(outputs={"steering": "steering.json"}, counts={"users": len(users)}, metrics=metrics)


def compare(
    phrase: Phrase,
    task: str,
    users: Sequence[UserContext],
    plain: Sequence[Ids],
    guided: Sequence[Ids],
    categories: dict[int, str],
    seed: int,
) -> dict[str, Any]:
    """The lists of the same users with and without a phrase behind the prompt of a task: item ids per user.

    `categories` has the category path of each item of the catalogue; the seed is that of the bootstrap.

    Returns:
        Shares of the lists in the phrase's categories and their difference with its interval, the share of the
        catalogue in them, overlap of the lists with the user's history, and how much of the plain list is kept.
    """
    wanted = np.array([item for item, path in categories.items() if phrase.fits(path)], dtype=np.int64)
    without, with_it = _shares(plain, [wanted] * len(users)), _shares(guided, [wanted] * len(users))
    low, high = mean_interval(with_it - without, seed)
    histories = [user.item_ids for user in users]
    return {
        "phrase": phrase.phrase,
        "task": task,
        "seen_in_training": phrase.seen_in_training,
        "catalogue": len(wanted) / len(categories),
        "without": float(without.mean()),
        "with": float(with_it.mean()),
        "gain": float((with_it - without).mean()),
        "low": low,
        "high": high,
        "history_without": float(_shares(plain, histories).mean()),
        "history_with": float(_shares(guided, histories).mean()),
        "kept": float(_shares(guided, plain).mean()),
    }


def mean_gains(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean gain over the phrases seen in training, and over the others, where there are any."""
    kinds = {"seen": [row["gain"] for row in rows if row["seen_in_training"]]}
    kinds["unseen"] = [row["gain"] for row in rows if not row["seen_in_training"]]
    return {kind: float(np.mean(gains)) for kind, gains in kinds.items() if gains}


def table(metrics: dict[str, Any]) -> Table:
    """The metrics as a table."""
    shown = Table(title=f"Share of the top {metrics['k']} in the phrase's categories", title_justify="left")
    shown.add_column("guidance")
    shown.add_column("task")
    shown.add_column("seen")
    for heading in ("catalogue", "without", "with", "gain [95 %]", "from history", "list kept", "next items found"):
        shown.add_column(heading, justify="right")
    for row in metrics["phrases"]:
        gain = f"{100 * row['gain']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        shares = [f"{100 * row[name]:.1f} %" for name in ("catalogue", "without", "with")]
        history = f"{100 * row['history_without']:.0f} → {100 * row['history_with']:.0f} %"
        seen = "yes" if row["seen_in_training"] else "no"
        kept = f"{100 * row['kept']:.0f} %"
        shown.add_row(row["phrase"], row["task"], seen, *shares, gain, history, kept, _describe_fit(row))
    shown.caption = "next items found: recall of users' next items in the categories, without → with (of another user)"
    return shown


def _describe_fit(row: dict[str, Any]) -> str:
    if row["next_with"] is None:
        return "–"
    other = "–" if row["next_other"] is None else f"{100 * row['next_other']:.0f}"
    return f"{100 * row['next_without']:.0f} → {100 * row['next_with']:.0f} % ({other}), n={row['next_users']}"


def _read_phrases(settings: Settings, config: RunConfig) -> PhraseBook:
    book = load_document(settings.configs_dir / "guidance" / f"{config.name}.yaml", PhraseBook)
    for _, name in book.pairs():
        config.task(name)  # fail on an unknown task before any work
    return book


def _read_categories(stage: StageRun) -> dict[int, str]:
    """Category path of the catalogue's items."""
    catalogue = set(pq.read_table(stage.path("features", "catalogue"), columns=["item_id"])["item_id"].to_pylist())
    rows = pq.read_table(stage.path("validate", "items"), columns=["item_id", "category"]).to_pylist()
    return {row["item_id"]: " > ".join(row["category"]) for row in rows if row["item_id"] in catalogue}


def _read_newest(stage: StageRun) -> dict[int, UserContext]:
    """The newest validation context of each user, so that nobody counts as two."""
    table = pq.read_table(stage.path("features", "contexts"), filters=_VALIDATION)
    rows = table.select(["user_id", "cut_ts"]).to_pandas().sort_values("cut_ts", kind="stable")
    return read_contexts(table.take(sorted(rows.drop_duplicates("user_id", keep="last").index)))


def _choose_users(contexts: Iterable[UserContext], seed: int) -> list[UserContext]:
    """A random sample of the contexts with a history."""
    known = [context for context in contexts if len(context.item_ids)]
    return [known[place] for place in np.random.default_rng(seed).permutation(len(known))[:NUM_USERS].tolist()]


def _read_asked(stage: StageRun, contexts: Mapping[int, UserContext]) -> dict[str, list[Asked]]:
    """Validation users with their next items, by task, in random order."""
    rows = pq.read_table(stage.path("features", "examples"), filters=_VALIDATION).to_pylist()
    asked: dict[str, list[Asked]] = {}
    for place in np.random.default_rng(stage.config.seed).permutation(len(rows)).tolist():
        context = contexts.get(rows[place]["context_id"])
        if context is not None and len(context.item_ids):
            targets = np.array(rows[place]["target_item_ids"], dtype=np.int64)
            asked.setdefault(rows[place]["task"], []).append((context, targets))
    return asked


def _choose_interested(asked: Sequence[Asked], phrase: Phrase, categories: dict[int, str]) -> list[Asked]:
    """Users whose next items are in the phrase's categories, with these items."""
    fitting = [
        (context, targets[[phrase.fits(categories.get(item, "")) for item in targets.tolist()]])
        for context, targets in asked
    ]
    return [(context, targets) for context, targets in fitting if len(targets)][:NUM_USERS]


def _measure_fit(
    recaller: UrmRecaller, interested: Sequence[Asked], task: Task, k: int, guidance: str
) -> dict[str, float | None]:
    contexts, targets = [context for context, _ in interested], [wanted for _, wanted in interested]
    plain, guided = _recall(recaller, contexts, task, k), _recall(recaller, contexts, task, k, guidance)
    return compare_fit(plain, guided, targets)


def compare_fit(plain: Sequence[Ids], guided: Sequence[Ids], targets: Sequence[Ids]) -> dict[str, float | None]:
    """Recall of users' next items in their lists without and with a guidance, and in the guided list of another user.

    `targets` are the next items of each user that are in the phrase's categories, at least one.

    Returns:
        The means over users by name, None where there are too few users.
    """
    others = [*guided[1:], *guided[:1]] if len(guided) > 1 else []
    found = {"next_without": plain, "next_with": guided, "next_other": others}
    means = {
        name: float(_shares(targets, lists).mean()) if len(targets) and len(lists) else None
        for name, lists in found.items()
    }
    return {"next_users": len(targets), **means}


def _recall(
    recaller: UrmRecaller, users: Sequence[UserContext], task: Task, k: int, guidance: str | None = None
) -> list[Ids]:
    return recaller.recall([RecallRequest(user, task, guidance=guidance) for user in users], k)[0]


def _shares(lists: Sequence[Ids], wanted: Sequence[Ids]) -> Shares:
    """Share of each list that is wanted [users]; zero for an empty list."""
    return np.array(
        [np.isin(items, some).mean() if len(items) else 0.0 for items, some in zip(lists, wanted, strict=True)]
    )
