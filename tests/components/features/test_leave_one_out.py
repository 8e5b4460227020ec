"""Leave-one-out by the stages, from a sequence file to examples, against the protocol told in plain Python."""

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import RunConfig, load_config
from components.schemas.examples import EXAMPLES
from components.stages import features as features
from components.stages import ingest as ingestion
from components.storage import run_stage
from tests.worlds import CONFIGS, make_settings
from tests.worlds.logs import write_run

MAX_TRAIN_CUTS = 6
HISTORY_LENGTH = 12
NUM_ITEMS, NUM_USERS = 150, 120
LEAVES = [f"Leaf {number} & more" for number in range(12)]
BRANDS = ["Acme", "Bolt", "Unknown", None]
WORDS = ["Quick", "silver", "lamp", "42", "XL", "for", "Gardens"]


@dataclass(frozen=True)
class Outcome:
    """What went in and what came out."""

    sequences: dict[str, list[int]]
    items: dict[int, dict[str, Any]]
    config: RunConfig
    contexts: dict[int, dict[str, Any]]
    examples: list[dict[str, Any]]
    catalogue: dict[int, dict[str, Any]]

    def of_task(self, name: str, split: str | None = None) -> list[dict[str, Any]]:
        rows = [row for row in self.examples if row["task"] == name and split in (None, row["split"])]
        assert rows
        return rows

    def user_of(self, example: dict[str, Any]) -> str:
        return str(self.contexts[example["context_id"]]["user_id"])

    def place_of(self, example: dict[str, Any]) -> int:
        """Place of the target in its user's sequence, from 0."""
        (target,) = example["target_item_ids"]
        return self.sequences[self.user_of(example)].index(target)

    def history_of(self, example: dict[str, Any]) -> list[int]:
        return self.sequences[self.user_of(example)][: self.place_of(example)]

    def target_of(self, example: dict[str, Any]) -> dict[str, Any]:
        return self.items[example["target_item_ids"][0]]


def make_items(rng: random.Random) -> dict[int, dict[str, Any]]:
    return {
        number: {
            "item_id": number,
            "asin": f"B{number:03d}",
            "title": " ".join(rng.sample(WORDS, 5)) if number % 9 else None,
            "phrase": f"phrase of {number}",
            "brand": rng.choice(BRANDS),
            "categories": ["Top", rng.choice(LEAVES)] if number % 10 else [],
        }
        for number in range(1, NUM_ITEMS + 1)
    }


def make_sequences(rng: random.Random) -> dict[str, list[int]]:
    """Sequences of 2 to 25 distinct items, few of them frequent."""
    sequences = {}
    for user in range(1, NUM_USERS + 1):
        length = rng.choice([2, 3, 5, 8, 25])
        drawn = [round(NUM_ITEMS * rng.random() ** 2) + 1 for _ in range(20 * length)]
        sequences[str(user)] = [item for item in dict.fromkeys(drawn) if item <= NUM_ITEMS][:length]
    return sequences


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    root, rng = tmp_path_factory.mktemp("leave_one_out"), random.Random(0)
    items, sequences = make_items(rng), make_sequences(rng)
    pq.write_table(pa.Table.from_pylist(list(items.values())), root / "items.parquet")
    lines = "".join(" ".join([user, *map(str, sequence)]) + "\n" for user, sequence in sequences.items())
    (root / "sequences.txt").write_text(lines)
    source = {"source.data_dir": str(root), "source.sequences": "sequences.txt"}
    lengths = {"features.split.max_train_cuts": MAX_TRAIN_CUTS, "features.history_length": HISTORY_LENGTH}
    config = load_config(CONFIGS / "amazon_beauty.yaml", source | lengths)
    settings = make_settings(root / "home")
    tables = run_stage("ingest", ingestion.run, config=config, run_dir=str(root / "runs/in"), settings=settings).outputs
    run_dir = write_run(root / "runs" / "one", Path(tables["events"]), Path(tables["items"]))
    result = run_stage("features", features.run, config=config, run_dir=str(run_dir), settings=settings)
    rows = {name: pq.read_table(result.outputs[name]) for name in ("contexts", "examples", "catalogue")}
    assert rows["examples"].schema.equals(EXAMPLES)
    contexts = {row["context_id"]: row for row in rows["contexts"].to_pylist()}
    catalogue = {row["item_id"]: row for row in rows["catalogue"].to_pylist()}
    return Outcome(sequences, items, config, contexts, rows["examples"].to_pylist(), catalogue)


def leaf(item: dict[str, Any]) -> str | None:
    return item["categories"][-1] if item["categories"] else None


def test_the_last_item_of_every_user_is_the_test_target(outcome: Outcome) -> None:
    found = {outcome.user_of(row): row["target_item_ids"] for row in outcome.of_task("next_item", "test")}
    assert found == {user: [sequence[-1]] for user, sequence in outcome.sequences.items()}


def test_the_second_to_last_item_is_the_validation_target(outcome: Outcome) -> None:
    found = {outcome.user_of(row): row["target_item_ids"] for row in outcome.of_task("next_item", "validation")}
    long_enough = {user: sequence for user, sequence in outcome.sequences.items() if len(sequence) > 2}
    assert found == {user: [sequence[-2]] for user, sequence in long_enough.items()}


def test_training_targets_are_the_newest_others_but_for_the_first(outcome: Outcome) -> None:
    found = {(outcome.user_of(row), outcome.place_of(row)) for row in outcome.of_task("next_item", "train")}
    assert found == {
        (user, place)
        for user, sequence in outcome.sequences.items()
        for place in range(max(1, len(sequence) - 2 - MAX_TRAIN_CUTS), len(sequence) - 2)
    }


def test_a_history_is_all_before_the_target_and_nothing_else(outcome: Outcome) -> None:
    for example in outcome.examples:
        context, history = outcome.contexts[example["context_id"]], outcome.history_of(example)
        assert context["split"] == example["split"]
        assert context["history_item_ids"] == history[::-1][:HISTORY_LENGTH]
        assert context["history_days_since"] == [1.0 + step for step in range(min(len(history), HISTORY_LENGTH))]
        assert context["num_events"] == context["num_items"] == len(history)


def test_the_catalogue_is_every_item_with_its_training_events(outcome: Outcome) -> None:
    training = Counter(item for sequence in outcome.sequences.values() for item in sequence[:-2])
    everything = {item for sequence in outcome.sequences.values() for item in sequence}
    assert {item: row["train_events"] for item, row in outcome.catalogue.items()} == {
        item: training[item] for item in everything
    }
    assert any(training[item] == 0 for item in everything)


def test_each_task_keeps_just_its_targets(outcome: Outcome) -> None:
    brands = {number: item["brand"] for number, item in outcome.items.items() if item["brand"] != "Unknown"}

    def wants(task: str, example: dict[str, Any]) -> bool:
        (target,), history = example["target_item_ids"], outcome.history_of(example)
        if task == "new_category":
            seen = {leaf(outcome.items[item]) for item in history}
            return leaf(outcome.items[target]) is not None and leaf(outcome.items[target]) not in seen
        if task == "tail_item":
            return bool(outcome.catalogue[target]["popularity_quantile"] <= 0.8)
        if task == "cold_item":
            return bool(outcome.catalogue[target]["train_events"] <= 2)
        if task == "same_brand":
            return brands.get(target) in {brands.get(item) for item in history} - {None}
        return len(history) >= 15  # long_history

    for task in ("new_category", "tail_item", "cold_item", "same_brand", "long_history"):
        found = {row["context_id"] for row in outcome.of_task(task)}
        everyone = outcome.of_task("next_item")
        assert found == {row["context_id"] for row in everyone if wants(task, row)}, task
        assert 0 < len(found) < len(everyone)


def test_held_out_queries_are_never_in_training(outcome: Outcome) -> None:
    queries = {
        (task, split): {row["query"] for row in outcome.examples if (row["task"], row["split"]) == (task, split)}
        for task in ("category_query", "unseen_category_query")
        for split in ("train", "validation", "test")
    }
    known = set().union(*(found for (task, _), found in queries.items() if task == "category_query"))
    unseen = set().union(*(found for (task, _), found in queries.items() if task != "category_query"))
    assert queries["unseen_category_query", "train"] == set()
    assert queries["unseen_category_query", "test"]
    assert not known & unseen
    assert known | unseen == {f"leaf {number} & more" for number in range(12)}


def test_every_target_with_a_category_is_asked_for_by_its_leaf(outcome: Outcome) -> None:
    asked = [*outcome.of_task("category_query"), *outcome.of_task("unseen_category_query")]
    assert all(row["query"] == str(leaf(outcome.target_of(row))).lower() for row in asked)
    of_test = [row["context_id"] for row in asked if row["split"] == "test"]
    wanted = [row["context_id"] for row in outcome.of_task("next_item", "test") if leaf(outcome.target_of(row))]
    assert sorted(of_test) == sorted(wanted)


def test_title_queries_are_words_of_the_title(outcome: Outcome) -> None:
    for row in outcome.of_task("title_query"):
        item = outcome.target_of(row)
        words = [word.lower() for word in (item["title"] or item["phrase"]).split()]
        places = [words.index(word) for word in row["query"].split()]
        assert places == sorted(set(places))
        assert len(places) == (3 if item["title"] else 1)  # of "phrase of 9" only the first has three letters
