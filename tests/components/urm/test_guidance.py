"""What the words of a guidance do to user vectors and to the recall."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from components.caches import CachePlace
from components.exceptions import DataError
from components.items.codes import lexical_vectors, list_words, query_vector
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller
from components.urm.network.build import build_model
from components.urm.retrieval.exact import ExactIndex
from tests.worlds.urm import NUM_ITEMS

NAMES = [f"{'pizza' if number % 6 == 0 else 'plain'} thing{number}" for number in range(NUM_ITEMS)]
CATEGORIES = [f"shop > {'barbecue' if number % 6 == 3 else 'shelf'}" for number in range(NUM_ITEMS)]
WITH_WORDS = {"lexical": list_words(NAMES), "category_words": list_words(CATEGORIES)}


def make_recaller(config, tables, folder, words):
    """An untrained model over items with words; its item table lists them, or none if it is an older one."""
    random = np.random.default_rng(2).normal(size=(NUM_ITEMS, 16)) / 4  # of length one, as encoders make them
    everyone = np.ones(NUM_ITEMS, dtype=bool)
    modalities = {
        "text": (random, everyone),
        "lexical": lexical_vectors(NAMES, 1024),
        "category_words": lexical_vectors(CATEGORIES, 512),
        POPULARITY: (np.zeros((NUM_ITEMS, 1)), everyone),
    }
    write_item_table(folder, tables.item_ids, modalities, words)
    torch.manual_seed(1)
    new = build_model(config.urm, ItemTable.open(folder), ["purchase"], CachePlace(folder))
    torch.nn.init.normal_(new.model.user_head.project.weight, std=0.01)  # untrained, it is zero: deaf to the prompt
    recaller = UrmRecaller(new.model.eval(), new.builder, "max")
    recaller.index = ExactIndex(tables.item_ids, recaller.encode_items(tables.item_ids))
    return recaller


@pytest.fixture
def recaller(config, tables, tmp_path):
    return make_recaller(config, tables, tmp_path / "table", WITH_WORDS)


@pytest.fixture
def older(config, tables, tmp_path):
    return make_recaller(config, tables, tmp_path / "older", None)


@pytest.fixture
def ask(tables, config):
    contexts = list(read_contexts(tables.contexts).values())[:6]
    task = config.task("next_purchase")
    return lambda guidance: [RecallRequest(context, task, guidance=guidance) for context in contexts]


def share(lists, remainder):
    return np.mean([[item % 1000 % 6 == remainder for item in items] for items in lists])


@pytest.mark.parametrize(("text", "remainder"), [("Pizza with friends.", 0), ("For a barbecue!", 3)])
def test_items_with_the_words_come_up_by_title_and_by_category(recaller, ask, text, remainder):
    plain, guided = recaller.recall(ask(None), 10)[0], recaller.recall(ask(text), 10)[0]
    assert share(guided, remainder) > share(plain, remainder) + 0.3
    assert any(set(some) != set(other) for some, other in itertools.pairwise(guided))  # the user counts


def test_without_a_guidance_every_bit_is_as_before(recaller, older, ask, config):
    with_words, without = recaller.encode_users(ask(None)), older.encode_users(ask(None))
    np.testing.assert_array_equal(with_words.vectors, without.vectors)
    task = config.task("text_query")
    block = recaller.builder.writer.block(task, "pizza shelf")
    expected = np.concatenate([query_vector("pizza shelf", 1024), query_vector("pizza shelf", 512)])
    np.testing.assert_array_equal(recaller.builder.reader.read_words([block])[0].numpy(), expected)


def test_words_that_no_item_has_leave_the_prompt_alone(recaller, older, ask):
    text = "Quantum zebras, please"
    guided = recaller.encode_users(ask(text))
    np.testing.assert_array_equal(guided.vectors, older.encode_users(ask(text)).vectors)
    assert (guided.vectors != recaller.encode_users(ask(None)).vectors).any()  # the prompt has them
    known = [recaller.builder.writer.block(ask(None)[0].task, None, guidance=text)]
    assert not recaller.builder.reader.read_words(known).any()


def test_an_older_table_without_words_has_the_prompt_alone(recaller, older, ask):
    assert (older.encode_users(ask("pizza")).vectors != recaller.encode_users(ask("pizza")).vectors).any()


def test_a_query_task_may_have_a_guidance_as_well(recaller, tables, config):
    context = next(iter(read_contexts(tables.contexts).values()))
    task = config.task("text_query")
    both = RecallRequest(context, task, "shelf", "pizza")
    lists, _ = recaller.recall([both, dataclasses.replace(both, guidance=None)], 10)
    assert share(lists[:1], 0) > share(lists[1:], 0)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_guidance_is_refused(ask, text):
    with pytest.raises(DataError, match="guidance: expected a text, got none; describe in a few words what to recall"):
        ask(text)
