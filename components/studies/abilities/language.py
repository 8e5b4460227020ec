"""Study `language`: how much of the backbone's language SFT keeps, and the quality of the text after [LM].

The backbone before SFT is the one that training starts from: same name, same depth. The backbone at full depth is
measured too, because cutting the depth costs more language than SFT does.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ibis
import mlflow
import numpy as np
import pyarrow.parquet as pq
import torch
from rich.table import Table

from components.caches import CachePlace
from components.config import RunConfig, load_document
from components.device import set_threads
from components.evaluation.bootstrap import mean_interval
from components.exceptions import DataError
from components.features.categories import word_label
from components.settings import Settings
from components.storage import StageReport, StageRun
from components.studies.abilities.likelihood import (
    LanguageModel,
    Question,
    Questions,
    accuracy,
    chance,
    perplexity,
    read_passages,
)
from components.studies.abilities.text_quality import (
    Names,
    choose_number,
    listed_names,
    measure_loss,
    score_names,
    score_texts,
    usual_names,
)
from components.studies.finished import hide_progress_bars, load_recaller
from components.tracking import track
from components.urm.data.examples import Example, Groups
from components.urm.inference import UrmRecaller
from components.urm.network.backbone import count_layers, load_backbone

SPOKEN_EXAMPLES = 200  # of the validation split; each generated token takes a forward pass
CHOICE_EXAMPLES = 400  # other ones
REPORT_EVERY = 10
_TEXT, _QUESTIONS = "plain_text.txt", "questions.yaml"


def options(settings: Settings) -> dict[str, Any]:
    """What decides the result besides code and configuration: the text and the questions."""
    files = [_folder(settings) / name for name in (_TEXT, _QUESTIONS)]
    return {"files": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()}


def run(stage: StageRun) -> StageReport:
    """Measure; the metrics are in result.json, in `language.json` and in MLflow."""
    set_threads(stage.settings)
    hide_progress_bars()
    folder = _folder(stage.settings)
    passages = read_passages(folder / _TEXT)
    questions = load_document(folder / _QUESTIONS, Questions).questions
    with track(stage):
        recaller = load_recaller(lambda output: stage.path("sft", output), stage.settings)
        network, writer = recaller.language()
        metrics: dict[str, Any] = {"passages": len(passages), "questions": len(questions), "chance": chance(questions)}
        models = {"after": LanguageModel(network, writer.tokenizer)}
        models |= _untrained(stage.config, CachePlace.of(stage.settings))
        for name, model in models.items():
            stage.report_progress(f"plain English, {name} SFT" if name != "full_depth" else "plain English, full depth")
            metrics[name] = _measure_language(model, passages, questions)
        metrics["text"] = _measure_text(stage, recaller)
        mlflow.log_metrics(_flat(metrics))
        mlflow.log_dict(metrics, "language.json")
    (stage.output / "language.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return StageReport(outputs={"language": "language.json"}, metrics=metrics)


def table(metrics: dict[str, Any]) -> Table:
    """The metrics as a table."""
    shown = Table("", "perplexity", "zero-shot questions", title="Language before and after SFT", title_justify="left")
    for name in ("full_depth", "before", "after"):
        value = metrics[name]
        heading = f"{name.replace('_', ' ')} ({value['layers']} layers)"
        shown.add_row(heading, f"{value['perplexity']:,.1f}", f"{100 * value['accuracy']:.0f} %")
    shown.add_row("guessing", "", f"{100 * metrics['chance']:.0f} %")
    text = metrics["text"]
    shown.caption = (
        f"[LM] text on {text['examples']} validation examples: {text['loss']:.3f} nats per token; category F1 "
        f"{text['f1']:.3f}, naming the user's usual categories {text['f1_usual']:.3f} ({_ahead(text, 'usual')}), "
        f"those of the recalled items {text['f1_listed']:.3f} ({_ahead(text, 'listed')})"
    ).replace("[LM]", r"\[LM]")
    return shown


def _ahead(text: dict[str, float], rule: str) -> str:
    ahead, low, high = (text[f"ahead_of_{rule}{end}"] for end in ("", "_low", "_high"))
    return f"text ahead by {ahead:+.3f}, {low:+.3f} … {high:+.3f}"


def _untrained(config: RunConfig, cache: CachePlace) -> dict[str, LanguageModel]:
    """The backbone before training, and at its full depth."""
    urm = config.urm
    torch.manual_seed(config.seed)
    before, tokenizer = load_backbone(urm.backbone, num_layers=urm.num_layers, pretrained=urm.pretrained, cache=cache)
    depth = count_layers(urm.backbone, cache)
    full, _ = load_backbone(urm.backbone, num_layers=depth, pretrained=True, cache=cache)
    return {"before": LanguageModel(before, tokenizer), "full_depth": LanguageModel(full, tokenizer)}


def _measure_language(model: LanguageModel, passages: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    return {
        "layers": model.model.config.num_hidden_layers,
        "perplexity": perplexity(model, passages),
        "accuracy": accuracy(model, questions),
    }


def _measure_text(stage: StageRun, recaller: UrmRecaller) -> dict[str, Any]:
    order = _validation_examples(stage)
    spoken, others = order[:SPOKEN_EXAMPLES], order[SPOKEN_EXAMPLES:][:CHOICE_EXAMPLES]
    stage.report_progress("text after [LM]: loss", examples=len(spoken))
    loss = measure_loss(recaller, spoken)

    def progress(done: int) -> None:
        if done % REPORT_EVERY == 0:
            stage.report_progress("text after [LM]: generating", done=done, of=len(spoken))

    said = score_texts(recaller, spoken, progress)
    found: dict[str, Any] = {"examples": len(spoken), "loss": loss, "f1": float(said.mean())}
    labels = _read_labels(stage.path("validate", "items"))
    stage.report_progress("text after [LM]: naming categories by rules", examples=len(spoken) + len(others))
    rules: dict[str, Callable[[Sequence[Example]], Names]]
    rules = {"usual": usual_names, "listed": partial(listed_names, recaller, labels=labels)}
    for name, rule in rules.items():
        number = choose_number(rule(others), others)
        scores = score_names(rule(spoken), spoken, number)
        low, high = mean_interval(said - scores, stage.config.seed)
        ahead = f"ahead_of_{name}"
        found |= {f"names_{name}": number, f"f1_{name}": float(scores.mean())}
        found |= {ahead: float((said - scores).mean()), f"{ahead}_low": low, f"{ahead}_high": high}
    return found


def _read_labels(path: Path) -> dict[int, str]:
    """Category in words of each item that has one."""
    items = ibis.memtable(pq.read_table(path, columns=["item_id", "category"]))
    table = items.select("item_id", label=word_label(items.category)).drop_null("label").to_pyarrow()
    return dict(zip(table["item_id"].to_pylist(), table["label"].to_pylist(), strict=True))


def _validation_examples(stage: StageRun) -> list[Example]:
    """The validation examples that have a text, in random order.

    Raises:
        DataError: There is none.
    """
    contexts = pq.read_table(stage.path("features", "contexts"), filters=[("split", "=", "validation")])
    tasks = {task.name: task for task in stage.config.tasks}
    groups = Groups(contexts, pq.read_table(stage.path("features", "examples")), tasks, "validation")
    examples = [example for _, group in groups for example in group if example.categories]
    if not examples:
        raise DataError(
            "text after [LM]",
            expected="validation examples whose items have a category",
            got="none",
            remedy="study a configuration whose items have categories",
        )
    order = np.random.default_rng(stage.config.seed).permutation(len(examples))
    return [examples[place] for place in order.tolist()]


def _folder(settings: Settings) -> Path:
    return settings.configs_dir / "language"


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    nested = {
        f"{name}.{key}": value
        for name, part in metrics.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    return nested | {name: value for name, value in metrics.items() if not isinstance(value, dict)}
