"""Guidance: free text that steers a task's recall, by the task's own prompt."""

from __future__ import annotations

import json

from components.config import Task
from components.exceptions import DataError


def guide(task: Task, text: str) -> Task:
    """The task with a guidance at the end of its prompt.

    The text is data: signs that Jinja2 would read as code arrive in the prompt as they are.

    Args:
        task: Any task of a run.
        text: What the user wants, in words, e.g. "For a barbecue."

    Raises:
        DataError: The text is empty.
    """
    words = " ".join(text.split())
    if not words:
        raise DataError("guidance", expected="a text", got="none", remedy="say in a few words what is wanted")
    # As a string literal of the template: Jinja2 reads the escapes of JSON.
    return task.model_copy(update={"prompt": f"{task.prompt} {{{{ {json.dumps(words, ensure_ascii=False)} }}}}"})
