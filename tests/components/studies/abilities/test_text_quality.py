import math

import pyarrow.parquet as pq
import pytest
import torch

from components.studies.abilities.text_quality import (
    LISTED_ITEMS,
    choose_number,
    f1,
    listed_names,
    measure_loss,
    named,
    score_names,
    score_texts,
    target_text,
    usual_names,
)
from components.studies.finished import FinishedRun
from components.urm.data.examples import Groups


@pytest.fixture
def run(finished, settings):
    return FinishedRun(str(finished[0]), settings)


@pytest.fixture
def examples(run, finished):
    tasks = {task.name: task for task in finished[1].tasks}
    tables = [pq.read_table(run.path("features", name)) for name in ("contexts", "examples")]
    return [example for _, group in Groups(*tables, tasks, "validation") for example in group][:11]


def test_names_between_commas():
    assert named(" Milk, bread rolls ,, milk") == {"milk", "bread rolls"}
    assert named("") == set()


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [({"a", "b"}, {"a", "b"}, 1), ({"a", "x"}, {"a", "b", "c"}, 0.4), ({"x"}, {"a"}, 0), (set(), {"a"}, 0)],
)
def test_f1_by_hand(said, wanted, value):
    assert f1(said, wanted) == pytest.approx(value)


def test_target_text_is_that_of_the_task(examples):
    assert target_text(examples[0]) == ", ".join(examples[0].categories)


def test_loss_of_many_equals_the_loss_of_one_at_a_time(run, examples):
    """Passes of eight with padding give the token-weighted mean of single passes."""
    recaller = run.recaller()
    writer = recaller.builder.writer
    lengths = [len(writer.block(e.request.task, e.request.query, e.categories).text) for e in examples]
    single = [measure_loss(recaller, [example]) for example in examples]
    expected = sum(loss * length for loss, length in zip(single, lengths, strict=True)) / sum(lengths)
    assert measure_loss(recaller, examples) == pytest.approx(expected, rel=2e-2)  # bfloat16 where there is one


def test_a_head_without_preference_has_the_loss_of_guessing(run, examples):
    recaller = run.recaller()
    with torch.no_grad():
        recaller.model.backbone.get_output_embeddings().weight.zero_()
    vocabulary = recaller.model.backbone.get_output_embeddings().weight.shape[0]
    assert measure_loss(recaller, examples) == pytest.approx(math.log(vocabulary), rel=1e-3)


def test_f1_of_what_is_said(run, examples, monkeypatch):
    recaller = run.recaller()
    monkeypatch.setattr(recaller, "generate_text", lambda request, max_tokens: answers.pop(0))
    answers = [target_text(examples[0]), "nonsense"]
    done = []
    assert score_texts(recaller, examples[:2], done.append).tolist() == [1, 0]
    assert done == [1, 2]


def test_names_are_the_usual_ones(examples):
    assert usual_names(examples) == [example.request.context.top_categories for example in examples]


def test_names_of_the_list_begin_with_the_most_frequent(run, examples):
    recaller = run.recaller()
    top = recaller.recall([examples[0].request], LISTED_ITEMS)[0][0].tolist()
    labels = dict.fromkeys(top[:3], "tea") | dict.fromkeys(top[3:8], "milk") | {top[8]: "rice"}
    assert listed_names(recaller, examples[:1], labels) == [["milk", "tea", "rice"]]


def test_a_rule_names_as_many_categories_as_did_best(examples):
    wanted = [sorted(named(target_text(example))) for example in examples]
    assert {len(names) for names in wanted} != {1}
    right_first = [[*names, "x", "y", "z"] for names in wanted]
    assert score_names(right_first, examples, 1).tolist() == [2 / (1 + len(names)) for names in wanted]
    assert choose_number([["x", names[0], "y"] for names in wanted], examples) == 2
    assert choose_number([["x"]] * len(examples), examples) == 1
    assert choose_number([[]] * len(examples), examples) == 1
    assert choose_number([], []) == 1
