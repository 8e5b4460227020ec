from __future__ import annotations

import jinja2
import pytest

from components.config import Task
from components.exceptions import DataError
from components.urm.guidance import guide

TASK = Task(name="query", description="A query.", prompt="Task: search for {{ query }}.")


@pytest.mark.parametrize(
    "text",
    ["For a barbecue.", '"quoted" \\n {{ 7 * 7 }} {% raw %} }} {# no #}', "Grüße für Weihnachten 🎄", "100 % it's"],
)
def test_guidance_stands_at_the_end_as_it_is(text):
    prompt = jinja2.Template(guide(TASK, text).prompt).render(query="milk")
    assert prompt == f"Task: search for milk. {text}"


def test_the_task_itself_stays_as_it_was():
    guided = guide(TASK, "Pets.")
    assert TASK.prompt == "Task: search for {{ query }}."
    assert guided.model_copy(update={"prompt": TASK.prompt}) == TASK


def test_line_breaks_become_spaces():
    assert guide(TASK, " a\n b ").prompt.endswith(' {{ "a b" }}')


def test_an_empty_guidance_is_refused():
    with pytest.raises(DataError, match="guidance: expected a text, got none"):
        guide(TASK, "  \n")
