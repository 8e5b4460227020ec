"""Runs a stage, or another `urm` command, as a process of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import BaseOperator

from components.settings import get_settings
from dags.common.outcome import MlflowLink, StageMixin, raise_for_exit_code, stage_arguments, stage_environment

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context

# Airflow kills the task's own process five seconds after it asked it to stop.
KILL_AFTER_SECONDS = 3


class UrmProcess(BaseOperator):
    """`urm …` in its own process group; its output is the task's log."""

    ui_color = "#e8f0fe"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._hook: SubprocessHook | None = None

    def run_urm(self, command: str, arguments: Sequence[str], context: Context) -> None:
        """Run the command to its end.

        Args:
            command: What messages call it.
            arguments: Arguments of `urm`.
            context: Of the running task.

        Raises:
            AirflowFailException: The input is wrong; not tried again.
            AirflowException: Any other failure.
        """
        self._hook = SubprocessHook()
        outcome = self._hook.run_command(
            [*_die_with_parent(), str(Path(sys.executable).with_name("urm")), *arguments],
            env={**os.environ, **stage_environment(context), "PYTHONUNBUFFERED": "1"},
            cwd=str(get_settings().configs_dir.absolute().parent),
        )
        raise_for_exit_code(command, outcome.exit_code, outcome.output)

    def on_kill(self) -> None:
        """Stop the stage's whole process group: politely, then for good."""
        process = self._hook.sub_process if self._hook else None
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(KILL_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


class StageProcessOperator(UrmProcess, StageMixin):
    """`urm <stage> …`, which leaves a result.json.

    Args:
        stage: Name of the stage.
    """

    operator_extra_links = (MlflowLink(),)
    template_fields: Sequence[str] = ()

    def __init__(self, *, stage: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage

    def execute(self, context: Context) -> None:
        """Run the stage and leave where its result is as XCom.

        Raises:
            AirflowFailException: The input is wrong; not tried again.
            AirflowException: Any other failure, or a success that left no result.
        """
        self.run_urm(self.stage, stage_arguments(self.stage, context), context)
        self.finish(context)


class CommandProcessOperator(UrmProcess):
    """Any `urm` command.

    Args:
        arguments: What follows `urm`; may be mapped over.
    """

    template_fields: Sequence[str] = ("arguments",)

    def __init__(self, *, arguments: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.arguments = arguments

    def execute(self, context: Context) -> None:
        """Run the command.

        Raises:
            AirflowFailException: The input is wrong; not tried again.
            AirflowException: Any other failure.
        """
        self.run_urm(self.arguments[0], self.arguments, context)


def _die_with_parent() -> list[str]:
    """Command prefix that ends the stage with its Airflow task, so that a retry never runs beside a left-over."""
    setpriv = shutil.which("setpriv")  # util-linux; elsewhere a killed task leaves its stage running to its end
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []
