"""Airflow's part in a deferred task, without Airflow: a new worker and a new triggerer for every step."""

import asyncio
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import TaskDeferred


class Store(dict[str, Any]):
    """The state store of a task instance: what Airflow keeps for it, whatever the try."""

    def set(self, key: str, value: Any) -> None:
        """Keep a value as JSON."""
        self[key] = json.loads(json.dumps(value))

    def delete(self, key: str) -> None:
        """Forget a value."""
        self.pop(key, None)


class DeferredTask:
    """One task instance.

    Attributes:
        operator: Of the last worker.
        trigger: What the task waits for, as another triggerer would build it; none: it has ended.
        kwargs: What it will be given beside the event.
    """

    def __init__(self, make_operator: Callable[[], BaseOperator], context: dict[str, Any]) -> None:
        self._make_operator, self.context = make_operator, context
        self.operator: Any = None
        self.trigger: Any = None
        self.kwargs: dict[str, Any] = {}

    def start(self) -> None:
        """Execute the task in a new worker."""
        self._work("execute")

    def step(self, seconds: float = 10) -> str:
        """Wait for the trigger's event, and give it to a new worker; returns the event's status."""

        async def first() -> dict[str, Any]:
            async for event in self.trigger.run():
                found: dict[str, Any] = event.payload
                return found
            raise AssertionError("the trigger ended without an event")

        event = asyncio.run(asyncio.wait_for(first(), seconds))
        self._work("trigger_reentry", event=event, **self.kwargs)
        return str(event["status"])

    @property
    def ended(self) -> bool:
        """Whether it has ended well."""
        return self.trigger is None

    def _work(self, method: str, **arguments: Any) -> None:
        self.operator = self._make_operator()
        self.operator.render_template_fields(self.context)
        try:
            getattr(self.operator, method)(self.context, **arguments)
        except TaskDeferred as deferred:
            path, given = deferred.trigger.serialize()
            module, _, name = path.rpartition(".")
            self.trigger = getattr(import_module(module), name)(**json.loads(json.dumps(given)))
            self.kwargs = json.loads(json.dumps(deferred.kwargs))
            return
        self.trigger = None
