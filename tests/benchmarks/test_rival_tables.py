import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import records, rival_tables


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rival_tables, "TRIALS", tmp_path)
    return tmp_path


def test_trials_of_all_searches_stand_in_one_table_by_their_behaviour_tasks(lines: Path) -> None:
    def trial(number: int, epochs: int, *recalls: float, **settings: object) -> str:
        recall = dict(zip(("next_item", "title_query", "mean"), recalls, strict=True))
        line = {"model": "target_attention", "trial": number, "epochs": epochs, "seconds": 1234.5}
        return json.dumps(line | {"settings": settings, "validation_recall": recall}) + "\n"

    of_search = trial(0, 1, 0.1, 0.9, 0.5) + trial(1, 1, 0.2, 0.3, 0.25, dimension=64, id_vectors=True, dropout=0.0)
    (lines / "amazon_toys.target_attention.jsonl").write_text(of_search)
    (lines / "amazon_toys.target_attention.longer.jsonl").write_text(trial(1, 4, 0.15, 0.4, 0.275, field_matches=True))
    (lines / "amazon_beauty.target_attention.jsonl").write_text(trial(0, 1, 1.0, 1.0, 1.0))
    _, _, *rows = rival_tables.render_trials("amazon_toys").splitlines()
    assert [row.strip("| ").split(" | ") for row in rows] == [
        ["target attention", "1", "1", "width 64, ID vectors", ".200", ".200", ".300", ".250", "1,234"],
        ["target attention", "1", "4", "fields", ".150", ".150", ".400", ".275", "1,234"],
        ["target attention", "0", "1", "as configured", ".100", ".100", ".900", ".500", "1,234"],
    ]


def test_a_data_set_without_a_search_has_an_empty_table(lines: Path) -> None:
    assert len(rival_tables.render_trials("amazon_sports").splitlines()) == 2


def test_first_items_are_those_of_models_with_every_cut_off_mean_over_the_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(seed: int, *rows: tuple[str, str, int, int]) -> None:
        hits = pd.DataFrame(rows, columns=["task", "model", "k", "hits"]).assign(targets=2, ndcg=0.25)
        folder = tmp_path / f"amazon_toys-tuned-seed{seed}" / "evaluate"
        folder.mkdir(parents=True)
        hits.to_parquet(folder / "hits.parquet")

    for module in (records, rival_tables):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    cutoffs = (5, 10, 20, 100)
    mix = [("next_item", "mix", k, int(k > 5)) for k in cutoffs]
    keep(0, *mix, ("next_item", "urm", 100, 2), *(("title_query", "text", k, 2) for k in cutoffs))
    keep(2, *[(task, model, k, 1) for task, model, k, _ in mix], *(("next_item", "popularity", k, 0) for k in cutoffs))
    _, _, *rows = rival_tables.render_first("amazon_toys").splitlines()
    assert [row.strip("| ").split(" | ") for row in rows] == [
        ["mix", ".2500", ".5000", ".2500", ".2500", ".5000", ".5000"],
        ["popularity", ".0000", ".0000", ".2500", ".2500", ".0000", ".0000"],
    ]
