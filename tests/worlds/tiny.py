"""A tiny world for tests: a run directory as the earlier stages leave it, around a small random model.

Everything is real but small: 60 items, 12 users, three tasks, a one-layer Llama, a Feast store with its online tables.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from components.addresses import write_json
from components.config import RunConfig, UrmConfig
from components.features.store import create_feature_store, materialize, offline
from components.items.table import POPULARITY as ITEM_POPULARITY
from components.items.table import ItemTable, write_item_table
from components.schemas.events import ITEMS
from components.schemas.examples import CONTEXTS, EXAMPLES
from components.schemas.predictions import POPULARITY, PREDICTIONS
from components.settings import Settings
from components.urm.data.batches import BatchBuilder, ItemReader
from components.urm.data.prompt import PromptWriter, add_special_tokens
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller
from components.urm.network.files import ModelDescription, save_model
from components.urm.network.heads import POPULARITY_RAMPS, POPULARITY_SCALE
from components.urm.network.model import Urm
from tests.worlds.backbone import tiny_llama
from tests.worlds.tables import Row, add_examples, context_row, item_row, put, write
from tests.worlds.vectors import write_candidates

NUM_ITEMS, NUM_USERS, NUM_KNOWN = 60, 12, 5
LAST_EVENT = datetime(2017, 12, 17, 12, tzinfo=UTC)
ITEM_IDS = np.arange(1000, 1000 + NUM_ITEMS, dtype=np.int64)


def make_config() -> RunConfig:
    """A run of three tasks, one of them with a query."""
    starts = {"train_start": "2017-07-03", "validation_start": "2017-11-13", "test_start": "2017-11-27"}
    split = {name: f"{day}T05:00:00Z" for name, day in (starts | {"end": "2017-12-18"}).items()}
    tasks = [
        {"name": "next_purchase", "description": "d", "prompt": "recommend what this customer buys"},
        {"name": "new_item", "description": "d", "prompt": "recommend new items", "target": {"history": "not_bought"},
         "exclude_bought": True},
        {"name": "text_query", "description": "d", "prompt": "customer searches {{ query }}",
         "target": {"query_category_level": 1}},
    ]  # fmt: skip
    values = {
        "features": {"split": split, "history_length": 20},
        "release": {"smoke_users": 3, "promote_timeout_seconds": 60},
        "recall": {"k": 10, "max_wait_ms": 5, "claim_idle_seconds": 0.5, "max_deliveries": 3, "batch_size": 4},
    }
    return RunConfig.model_validate({"name": "tiny", "source": {"kind": "complete_journey"}, "tasks": tasks} | values)


def make_run(run_dir: Path, settings: Settings, *, seed: int = 0, gate_passed: bool = True) -> RunConfig:
    """Leave what the stages before `release` leave, with their result.json."""
    config, features, sft = make_config(), run_dir / "features", run_dir / "sft"
    items = [item_row(item, category=["food", f"shelf {item % 7}"]) for item in ITEM_IDS.tolist()]
    make_feature_store(features / "feature_store", settings)
    contexts = make_contexts()
    make_model(sft, seed)
    recaller = UrmRecaller.load(sft / "model", sft / "item_table", sft / "candidates")
    examples, predictions = ask_model(recaller, config, contexts)
    popularity = [
        {"task": task.name, "item_id": item, "score": float(NUM_ITEMS - rank)}
        for task in config.tasks
        for rank, item in enumerate(ITEM_IDS[:30])
    ]
    verdict = {"passed": gate_passed, "verdict": "Measured.", "reasons": [] if gate_passed else ["lift below zero"]}
    write_json(str(run_dir / "gate" / "verdict.json"), verdict)
    outputs = {
        "validate": {"items": write(run_dir / "validate" / "items.parquet", ITEMS, items)},
        "features": {
            "feature_store": features / "feature_store",
            "contexts": write(features / "contexts.parquet", CONTEXTS, contexts),
            "examples": write(features / "examples.parquet", EXAMPLES, examples),
        },
        "baseline": {"popularity": write(run_dir / "baseline" / "popularity.parquet", POPULARITY, popularity)},
        "sft": {name: sft / name for name in ("model", "item_table", "candidates")},
        "evaluate": {"predictions": write(run_dir / "evaluate" / "predictions.parquet", PREDICTIONS, predictions)},
        "gate": {"verdict": run_dir / "gate" / "verdict.json"},
    }
    for stage, files in outputs.items():
        metrics = {"passed": gate_passed} if stage == "gate" else {}
        put(run_dir, stage, files, config=config.name, fingerprint=f"{stage}-{seed}", metrics=metrics)
    return config


def known_items(user: int) -> list[int]:
    """The five items of a user's history, newest first."""
    return [int(ITEM_IDS[(3 * user + step) % NUM_ITEMS]) for step in range(NUM_KNOWN)]


def make_feature_store(folder: Path, settings: Settings) -> None:
    """Users "0" … "11", each with five items, one an hour up to LAST_EVENT."""
    folder.mkdir(parents=True)
    last_us = [int((LAST_EVENT - timedelta(hours=step)).timestamp() * 1e6) for step in range(NUM_KNOWN)]
    users = [str(user) for user in range(NUM_USERS)]
    known_at = pa.array([LAST_EVENT + timedelta(microseconds=1)] * NUM_USERS, pa.timestamp("us", tz="UTC"))
    repeat = [[1] * NUM_KNOWN] * NUM_USERS
    sequence = {
        "user_id": users,
        "known_at": known_at,
        "history_item_ids": pa.array([known_items(user) for user in range(NUM_USERS)], pa.list_(pa.int64())),
        "history_counts": pa.array(repeat, pa.list_(pa.int32())),
        "history_last_us": pa.array([last_us] * NUM_USERS, pa.list_(pa.int64())),
        "history_behaviors": [["purchase"] * NUM_KNOWN] * NUM_USERS,
    }
    counts = {"num_events": NUM_KNOWN, "num_items": NUM_KNOWN, "num_active_days": 1, "last_us": last_us[0]}
    columns = {name: pa.array([count] * NUM_USERS, pa.int64()) for name, count in counts.items()}
    statistics = {"user_id": users, "known_at": known_at} | columns
    statistics |= {"top_categories": [["shelf 1", "shelf 2"]] * NUM_USERS}
    pq.write_table(pa.table(sequence), folder / "behavior_sequence.parquet")
    pq.write_table(pa.table(statistics), folder / "user_statistics.parquet")
    with offline(folder):
        store = create_feature_store(folder, settings, "a")
        materialize(store, LAST_EVENT + timedelta(days=1), print)


def make_contexts() -> list[Row]:
    """The history of every user an hour after the last event."""
    days = [(1 + step) / 24 for step in range(NUM_KNOWN)]
    shared = {"history_days_since": days, "days_since_last": days[0], "top_categories": ["shelf 1", "shelf 2"]}
    cut = LAST_EVENT + timedelta(hours=1)
    return [
        context_row(user, "test", known_items(user), user_id=str(user), cut_ts=cut, **shared)
        for user in range(NUM_USERS)
    ]


def make_model(folder: Path, seed: int) -> None:
    """A random model, its item table, and the candidates it gives."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    everything = np.ones(NUM_ITEMS, dtype=bool)
    vectors = {"id": random.normal(size=(NUM_ITEMS, 8)), "text": random.normal(size=(NUM_ITEMS, 12))}
    popularity = np.log1p(np.arange(1, NUM_ITEMS + 1))[:, None]
    modalities = {name: (array, everything) for name, array in (vectors | {ITEM_POPULARITY: popularity}).items()}
    write_item_table(folder / "item_table", ITEM_IDS, modalities)
    config = UrmConfig(
        num_layers=1, num_user_vectors=2, modalities=("id", "text"), fusion_dimension=16, history_length=16
    )
    tokenizer = make_tokenizer()
    add_special_tokens(tokenizer, config.num_user_vectors)
    llama = tiny_llama(len(tokenizer), num_layers=1, tie_word_embeddings=False, initializer_range=0.02)
    widths = {name: array.shape[1] for name, array in vectors.items()}
    model = Urm(LlamaForCausalLM(llama), config, widths, num_counts=1, num_behaviors=1).eval()
    writer = PromptWriter(tokenizer, config)
    description = ModelDescription(
        config=config,
        widths=widths,
        num_counts=1,
        behaviors=("purchase",),
        popularity_scale=POPULARITY_SCALE,
        ramps=POPULARITY_RAMPS,
    )
    save_model(folder / "model", model, writer, description)
    reader = ItemReader(ItemTable.open(folder / "item_table"), config.modalities)
    recaller = UrmRecaller(model, BatchBuilder(writer, reader, ("purchase",), config.copy_length), config.combine)
    write_candidates(folder / "candidates", recaller, ITEM_IDS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, of the words that prompts use."""
    words = "<unk> <end> Customer with purchases of items on days the last ago Often History customer recommend".split()
    words += "what this buys new searches shelf . , : ;".split() + [str(number) for number in range(20)]
    unknown, end = words[:2]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, eos_token=end, pad_token=end)


def ask_model(recaller: UrmRecaller, config: RunConfig, contexts: list[Row]) -> tuple[list[Row], list[Row]]:
    """Examples of every task and user, and what the model predicts for them."""
    examples: list[Row] = []
    requests = []
    by_id = read_contexts(pa.Table.from_pylist(contexts, schema=CONTEXTS))
    for row in contexts:
        for task in config.tasks:
            query = "shelf 3" if task.needs_query else None
            add_examples(examples, row, {task.name: [1000]}, query=query, target_categories=["shelf 0"])
            requests.append(RecallRequest(by_id[row["context_id"]], task, query))
    items, scores = recaller.recall(requests, 10)
    return examples, [
        {"example_id": number, "model": "urm", "item_ids": ids, "scores": row}
        for number, (ids, row) in enumerate(zip(items, scores, strict=True))
    ]
