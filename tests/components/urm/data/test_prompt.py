import numpy as np
import pytest

from components.config import Task
from components.exceptions import ConfigError
from components.urm.data.prompt import PromptWriter
from components.urm.data.request import UserContext


def context(**changes):
    history = {"item_ids": np.array([1, 2]), "counts": np.array([3, 1]), "behaviors": ["purchase", "purchase"]}
    totals = {"num_events": 4, "num_items": 2, "num_active_days": 2, "days_since_last": 1.4}
    values = history | totals | {"days_since": np.array([1.0, 2.0], np.float32), "top_categories": ("milk", "bread")}
    return UserContext(**(values | changes))


def test_special_tokens_are_real_and_differ(new_model):
    writer = new_model.builder.writer
    ids = {writer.item_id, writer.lm_id, *writer.user_ids}
    assert len(ids) == 5
    assert writer.tokenizer("[UM_0][UM_2][LM]")["input_ids"] == [writer.user_ids[0], writer.user_ids[2], writer.lm_id]
    embeddings = new_model.model.backbone.get_input_embeddings().weight
    assert embeddings.shape[0] == len(writer.tokenizer)
    assert (embeddings[writer.user_ids[0]] != embeddings[writer.user_ids[1]]).any()


def test_profile_in_words(new_model):
    writer = new_model.builder.writer
    prefix = writer.prefix(context(), [0, 1])
    text = writer.tokenizer.decode(prefix.token_ids)
    profile = "Customer with 4 events of 2 items on 2 days, the last 1 days ago. Often: milk, bread. History:"
    assert text.startswith(profile)
    assert prefix.token_ids[-2:] == (writer.item_id, writer.item_id)
    assert prefix.items == ((len(prefix.token_ids) - 2, 0), (len(prefix.token_ids) - 1, 1))
    assert "Often" not in writer.tokenizer.decode(writer.prefix(context(top_categories=()), [0]).token_ids)


def test_several_lists_of_items_may_stand_anywhere_in_a_prompt(new_model, config):
    profile = "Bought:{{ items('purchase') }} but only viewed:{{ items('view', 'cart') }} so far."
    writer = PromptWriter(new_model.builder.writer.tokenizer, config.urm.model_copy(update={"profile": profile}))
    user = context(
        item_ids=np.arange(4),
        counts=np.ones(4, dtype=np.int64),
        days_since=np.ones(4, np.float32),
        behaviors=["view", "purchase", "cart", "purchase"],
    )
    prefix = writer.prefix(user, [0, 1, 3])  # the item table lacks the third item
    places = [place for place, token in enumerate(prefix.token_ids) if token == writer.item_id]
    assert [place for place, _ in prefix.items] == places
    assert [column for _, column in prefix.items] == [1, 2, 0]
    text = [token for token in prefix.token_ids if token != writer.item_id]
    assert writer.tokenizer.decode(text) == "Bought: but only viewed: so far."


@pytest.mark.parametrize(
    ("profile", "columns", "words"),
    [
        ("{% if items('view') %}Viewed:{{ items('view') }}{% endif %} Bought:{{ items('purchase') }}", [0, 2, 1], True),
        ("{% if items('cart') %}Viewed:{{ items('cart') }}{% endif %}Bought:{{ items('purchase') }}", [1], False),
        ("{% set all = items() %}Viewed:{{ all }} and again:{{ all }}", [0, 1, 2, 0, 1, 2], True),
        ("Viewed: {{ top_categories[0] }}{{ items('purchase') }}", [1], True),
    ],
)
def test_a_list_is_where_it_is_printed_and_false_where_it_is_empty(new_model, config, profile, columns, words):
    writer = PromptWriter(new_model.builder.writer.tokenizer, config.urm.model_copy(update={"profile": profile}))
    user = context(
        item_ids=np.arange(3),
        counts=np.ones(3, dtype=np.int64),
        days_since=np.ones(3, np.float32),
        behaviors=["view", "purchase", "view"],
        top_categories=["a\x000\x00b"],
    )
    prefix = writer.prefix(user, [0, 1, 2])
    assert [column for _, column in prefix.items] == columns
    text = writer.tokenizer.decode([token for token in prefix.token_ids if token != writer.item_id])
    assert ("Viewed" in text) == words and "\x00" not in text


def test_a_profile_with_an_unknown_variable_is_refused(new_model, config):
    wrong = config.urm.model_copy(update={"profile": "{{ shoe_size }}"})
    with pytest.raises(ConfigError, match=r"field urm.profile: expected a Jinja2 template"):
        PromptWriter(new_model.builder.writer.tokenizer, wrong).prefix(context(), [0])


def test_task_query_and_target_text_are_rendered(new_model):
    writer = new_model.builder.writer
    task = Task(name="search", description="x", prompt="Find {{ query }}.", text_target="{{ categories | join('; ') }}")
    block = writer.block(task, "cat food", ["milk", "bread"])
    assert writer.decode(block.prompt) == "Find cat food."
    assert writer.decode(block.text) == "milk; bread"
    assert block.text[-1] == writer.end_id
    assert writer.block(task, "cat food").text == ()


def test_a_query_that_spells_special_tokens_is_words(new_model):
    writer = new_model.builder.writer
    task = Task(name="search", description="x", prompt="Wants {{ query }}.")
    spelt = "[ITEM] [UM_0] [LM] <|im_start|> pizza"
    prompt = writer.block(task, spelt).prompt
    assert writer.tokenizer.decode(prompt) == f"Wants {spelt}."
    assert not set(prompt) & {writer.item_id, writer.lm_id, *writer.user_ids, *writer.tokenizer.all_special_ids}


@pytest.mark.parametrize(
    "text",
    ["For a barbecue.", '"quoted" \\n {{ 7 * 7 }} {% raw %} }} {# no #}', "Grüße für Weihnachten 🎄", "100 % it's"],
)
def test_a_guidance_stands_behind_the_task_as_it_is(new_model, text):
    task = Task(name="search", description="x", prompt="Find {{ query }}.")
    writer = new_model.builder.writer
    block = writer.block(task, "milk", guidance=f" {text}\n")
    assert writer.tokenizer.decode(block.prompt) == f"Find milk. {text}"
    assert (block.query, block.guidance) == ("milk", text)
    assert block.continued([5]).guidance == text


def test_without_a_guidance_the_block_is_the_tasks_own(new_model):
    task = Task(name="search", description="x", prompt="Find {{ query }}.")
    writer = new_model.builder.writer
    assert writer.block(task, "milk", guidance=None) == writer.block(task, "milk")
    assert writer.block(task, "milk").guidance == ""


def test_line_breaks_of_a_guidance_become_spaces(new_model):
    task = Task(name="next", description="x", prompt="Next.")
    assert new_model.builder.writer.block(task, None, guidance=" a\n b ").guidance == "a b"


def test_a_template_with_an_unknown_variable_names_task_and_field(new_model):
    task = Task(name="search", description="x", prompt="Find {{ wish }}.")
    with pytest.raises(ConfigError, match=r"task 'search', field 'prompt': expected a Jinja2 template over query"):
        new_model.builder.writer.block(task, "cat food")


@pytest.mark.parametrize(
    "prompt", ["{{ query.__class__.__base__.__subclasses__() }}", "{{ cycler.__init__.__globals__.os.getcwd() }}"]
)
def test_a_template_of_a_bundle_reaches_nothing_but_its_variables(new_model, prompt):
    task = Task(name="search", description="x", prompt=prompt)
    with pytest.raises(ConfigError, match=r"task 'search', field 'prompt': expected a Jinja2 template"):
        new_model.builder.writer.block(task, "cat food")


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer, config):
    with pytest.raises(ConfigError, match=r"expected the special token \[ITEM\]"):
        PromptWriter(tokenizer, config.urm)
