import json
import math
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.exceptions import DataError
from components.flow import STUDIES
from components.storage import run_stage
from components.studies.abilities import language
from components.studies.abilities.language import options, run, table


@pytest.fixture
def short(settings, monkeypatch):
    """Two sentences, two questions, few spoken texts."""
    folder = settings.configs_dir / "language"
    (folder / "plain_text.txt").write_text("The cat sat.\n\nA dog ran home.\n")
    (folder / "questions.yaml").write_text(
        "questions:\n  - {question: 'A cat', choices: [sat, ran]}\n  - {question: 'Who?', choices: [cat, dog, cow]}\n"
    )
    monkeypatch.setattr(language, "SPOKEN_EXAMPLES", 2)
    monkeypatch.setattr(language, "CHOICE_EXAMPLES", 3)
    return settings


def test_language_before_and_after_is_measured_and_tracked(short, finished):
    run_dir, config = finished
    given = {"config": config, "run_dir": str(run_dir), "settings": short, "options": options(short)}
    result = run_stage(STUDIES["language"], run, **given, force=True)
    metrics = result.metrics
    assert metrics["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert (metrics["before"]["layers"], metrics["after"]["layers"], metrics["full_depth"]["layers"]) == (1, 1, 2)
    assert all(metrics[name]["perplexity"] > 1 for name in ("before", "after", "full_depth"))
    # The tiny model of the run was never trained, and the special tokens take hardly any probability.
    assert metrics["after"]["perplexity"] == pytest.approx(metrics["before"]["perplexity"], rel=0.1)
    text = metrics["text"]
    assert text["examples"] == 2
    assert text["loss"] > 0
    for rule in ("usual", "listed"):
        assert text[f"ahead_of_{rule}"] == pytest.approx(text["f1"] - text[f"f1_{rule}"])
        assert text[f"ahead_of_{rule}_low"] <= text[f"ahead_of_{rule}"] <= text[f"ahead_of_{rule}_high"]
    assert json.loads(Path(result.outputs["language"]).read_text()) == metrics
    logged = mlflow.search_runs(search_all_experiments=True, filter_string="tags.`urm.stage` = 'language'")
    assert math.isclose(logged["metrics.after.perplexity"].iloc[0], metrics["after"]["perplexity"])
    assert table(metrics).row_count == 4


def test_another_text_is_another_result(short):
    before = options(short)
    (short.configs_dir / "language" / "plain_text.txt").write_text("Something else.\n")
    assert options(short) != before


def test_items_without_categories_have_no_text(short, finished, monkeypatch):
    run_dir, config = finished
    read = pq.read_table

    def without_categories(path, **options):
        table = read(path, **options)
        if "target_categories" not in table.column_names:
            return table
        nothing = pa.array([[]] * len(table), pa.list_(pa.string()))
        return table.set_column(
            table.column_names.index("target_categories"), table.schema.field("target_categories"), nothing
        )

    monkeypatch.setattr(language.pq, "read_table", without_categories)
    given = {"config": config, "run_dir": str(run_dir), "settings": short, "options": options(short)}
    with pytest.raises(DataError, match="validation examples whose items have a category, got none; study a config"):
        run_stage(STUDIES["language"], run, **given, force=True)
