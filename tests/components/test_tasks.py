"""The nine tasks of configs/tasks: they load, differ in what they ask, and their prompts render."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from components.config import Task, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
TASKS = load_config(CONFIGS / "complete_journey.yaml").tasks
by_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def render(template: str, **values: object) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - plain text
    return environment.from_string(template).render(**values)


def test_every_file_is_a_task_of_the_default_run_and_named_like_it() -> None:
    assert {task.name for task in TASKS} == {path.stem for path in (CONFIGS / "tasks").glob("*.yaml")}
    assert len(TASKS) == 9


def test_no_two_tasks_ask_for_the_same() -> None:
    for field in ("prompt", "description", "target"):
        values = [repr(getattr(task, field)) for task in TASKS]
        assert len(set(values)) == len(values), field


@by_task
def test_prompt_and_text_target_render(task: Task) -> None:
    query = {"query": "soft drinks"} if task.needs_query else {}
    prompt = render(task.prompt, **query)
    assert prompt.startswith("Task: ")
    assert ("soft drinks" in prompt) == task.needs_query
    assert render(task.text_target, categories=["beef", "milk"], **query) == "beef, milk"


@by_task
def test_candidates_are_restricted_only_where_no_target_can_be_lost(task: Task) -> None:
    """`exclude_bought` hides items the user already had, so it needs a filter that never wants one of them."""
    wants_new = task.target.history == "not_bought" or task.target.new_category_level is not None
    assert task.exclude_bought == wants_new
