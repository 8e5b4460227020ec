"""The tasks of configs/tasks: they load, differ in what they ask, and their prompts render."""

import jinja2
import pytest
import yaml

from components.config import TargetFilter, Task, load_config
from tests.worlds import CONFIGS

SETS = {path.stem: load_config(path).tasks for path in sorted(CONFIGS.glob("*.yaml"))}
TASKS = list({task.name: task for tasks in SETS.values() for task in tasks}.values())
SAME_PROMPT = {"category_query", "unseen_category_query"}  # they differ in the queries, not in the question
by_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def render(template: str, **values: object) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - plain text
    return environment.from_string(template).render(**values)


def test_every_file_is_a_task_of_a_run_and_named_like_it() -> None:
    assert {task.name for task in TASKS} == {path.stem for path in (CONFIGS / "tasks").glob("*.yaml")}
    for name in ("complete_journey", "amazon_beauty", "amazon_sports"):
        assert len(SETS[name]) == 9


def test_no_two_tasks_of_a_run_ask_for_the_same() -> None:
    for tasks in SETS.values():
        for field in ("prompt", "description", "target"):
            values = [repr(getattr(task, field)) for task in tasks if field != "prompt" or task.name not in SAME_PROMPT]
            assert len(set(values)) == len(values), field


def test_a_task_for_unseen_queries_asks_like_the_one_for_known_queries() -> None:
    for tasks in SETS.values():
        assert len({task.prompt for task in tasks if task.name in SAME_PROMPT}) <= 1


@by_task
def test_whether_bought_items_count_is_written_out(task: Task) -> None:
    content = yaml.safe_load((CONFIGS / "tasks" / f"{task.name}.yaml").read_text())
    assert content["exclude_bought"] == task.exclude_bought


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


def test_a_task_that_could_recall_no_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected task 'again' to want new items only .*exclude_bought"):
        Task(name="again", description="", prompt="", target=TargetFilter(history="bought"), exclude_bought=True)
    assert Task(name="new", description="", prompt="", target=TargetFilter(new_category_level=1), exclude_bought=True)
