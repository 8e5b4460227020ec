import math

import pyarrow.parquet as pq
import pytest
import torch

from components.studies.abilities.text_quality import f1, measure_f1, measure_loss, named, target_text
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


def test_f1_of_what_is_said_and_of_the_usual_categories(run, examples, monkeypatch):
    recaller = run.recaller()
    monkeypatch.setattr(recaller, "generate_text", lambda request, max_tokens: answers.pop(0))
    answers = [target_text(examples[0]), "nonsense"]
    done = []
    said, usual = measure_f1(recaller, examples[:2], done.append)
    assert said == pytest.approx(0.5)
    assert done == [1, 2]
    expected = [f1({"milk"}, set(example.categories)) for example in examples[:2]]
    assert usual == pytest.approx(sum(expected) / 2)
