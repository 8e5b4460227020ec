"""Runs a stage, or another `urm` command, as a process of this machine."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import BaseOperator, Context

from components.child_process import die_with_parent
from components.flow import STAGES
from components.settings import child_environment, get_settings
from dags.common.outcome import MlflowLink, StageMixin, raise_for_exit_code
from dags.common.params import process_variables, stage_arguments

URM = Path(sys.executable).with_name("urm")
# Airflow kills the task's own process five seconds after it asked it to stop.
KILL_AFTER_SECONDS = 3


class UrmProcessOperator(BaseOperator):
    """`urm …` in its own process group; its output is the task's log.

    Args:
        arguments: What follows `urm`, or a function of the context that returns it; may be mapped over.
        credentials: Services whose credentials the process needs: `mlflow`, `redis`.
    """

    template_fields: Sequence[str] = ("arguments", "environment")
    ui_color = "#e8f0fe"

    def __init__(
        self, *, arguments: list[str] | Callable[..., list[str]], credentials: Collection[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.arguments: Any = arguments  # a list once rendered
        self.environment: Any = process_variables  # a dictionary once rendered
        self.credentials = sorted(credentials)
        self.last_line = ""  # of its output, once it has ended
        self._hook: SubprocessHook | None = None

    def execute(self, context: Context) -> None:
        """Run the command to its end.

        Raises:
            AirflowFailException: The input is wrong; not tried again.
            AirflowException: Any other failure.
        """
        self._hook = SubprocessHook()
        outcome = self._hook.run_command(
            [*die_with_parent(), str(URM), *self.arguments],  # so that a retry never runs beside a left-over
            env={**child_environment(self.credentials), **self.environment, "PYTHONUNBUFFERED": "1"},
            cwd=str(get_settings().configs_dir.absolute().parent),
        )
        self.last_line = outcome.output
        raise_for_exit_code(self.arguments[0], outcome.exit_code, outcome.output)

    def on_kill(self) -> None:
        """Stop the whole process group: SIGTERM first, then SIGKILL."""
        process = self._hook.sub_process if self._hook else None
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(KILL_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


class StageProcessOperator(UrmProcessOperator, StageMixin):
    """`urm <stage> …`, which leaves a result.json."""

    operator_extra_links = (MlflowLink(),)
    inherits_from_skipmixin = True  # what the gate skipped stays skipped when it is cleared without the gate

    def __init__(self, *, stage: str, **kwargs: Any) -> None:
        super().__init__(arguments=partial(stage_arguments, stage), credentials=STAGES[stage].credentials, **kwargs)
        self.stage = stage
        self.environment = partial(process_variables, stage=stage)

    def execute(self, context: Context) -> None:
        """Run the stage and leave where its result is as XCom.

        Raises:
            AirflowFailException: The input is wrong; not tried again.
            AirflowException: Any other failure, or a success that left no result.
        """
        super().execute(context)
        self.finish(context)
