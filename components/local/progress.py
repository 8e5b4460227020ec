"""Follows a DAG run: the state of each stage, its seconds, and its last message."""

import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from components.addresses import join, read_json
from components.flow import STAGES
from components.local.airflow import AirflowClient
from components.storage import load_result

_POLL_SECONDS = 1.0
_QUIET_SECONDS = 20.0  # between two lines about the same running stage, where there is no terminal
_COLOURS = {
    "success": "green",
    "running": "cyan",
    "failed": "bold red",
    "skipped": "magenta",
    "upstream_failed": "red",
    "up_for_retry": "yellow",
}
_NUMBERS_SHOWN = 4


class RunWatch:
    """One DAG run, as it goes."""

    def __init__(self, client: AirflowClient, dag_id: str, run_id: str, run_dir: str) -> None:
        self._client, self._dag_id, self._run_id, self._run_dir = client, dag_id, run_id, run_dir
        self._said: dict[str, tuple[str, float]] = {}

    def follow(self, console: Console) -> str:
        """Show progress until the run has ended; returns its state, success or failed."""
        if console.is_terminal:
            with Live(console=console, refresh_per_second=4) as live:
                return self._poll(lambda rows: live.update(_as_table(rows)))
        return self._poll(lambda rows: self._print_changes(console, rows))

    def failures(self) -> dict[str, list[str]]:
        """Failed tasks and the end of their last log, without Airflow's own lines."""
        tasks = self._client.tasks(self._dag_id, self._run_id)
        return {
            name: _reason(self._client.log_lines(self._dag_id, self._run_id, name, task["try_number"]))
            for name, task in tasks.items()
            if task["state"] == "failed"
        }

    def states(self) -> dict[str, str]:
        """Stage → state of its task."""
        tasks = self._client.tasks(self._dag_id, self._run_id)
        return {stage: tasks[stage]["state"] or "waiting" for stage in STAGES if stage in tasks}

    def _poll(self, show: Any) -> str:
        while True:
            state = str(self._client.run(self._dag_id, self._run_id)["state"])
            tasks = self._client.tasks(self._dag_id, self._run_id)
            show([self._row(stage, tasks[stage]) for stage in STAGES if stage in tasks])
            if state in ("success", "failed"):
                return state
            time.sleep(_POLL_SECONDS)

    def _row(self, stage: str, task: dict[str, Any]) -> tuple[str, str, float | None, str]:
        """Stage, state, seconds and last word."""
        state = task["state"] or "waiting"
        if state == "success":
            result = load_result(self._run_dir, stage)
            if result is not None and result.reused_from:
                return stage, state, task["duration"], "reused from an earlier run"
            return stage, state, task["duration"], _numbers({} if result is None else result.metrics | result.counts)
        if state != "running":
            return stage, state, None, f"try {task['try_number']} failed" if state == "up_for_retry" else ""
        begun = datetime.fromisoformat(task["start_date"]) if task["start_date"] else datetime.now(UTC)
        word = read_json(join(self._run_dir, stage, "progress.json"))
        # A word older than this try is that of an earlier one.
        text = ""
        if word is not None and word["at"] >= begun.timestamp():
            text = f"{word['message']} {_numbers(word['metrics'])}".strip()
        return stage, state, (datetime.now(UTC) - begun).total_seconds(), text

    def _print_changes(self, console: Console, rows: list[tuple[str, str, float | None, str]]) -> None:
        for stage, state, seconds, text in rows:
            before, at = self._said.get(stage, ("waiting", 0.0))
            now = time.monotonic()
            current = state if state != "running" else f"running {text}"
            settled = state != "running" or before.split(" ")[0] != "running" or now - at > _QUIET_SECONDS
            if current != before and settled:
                self._said[stage] = (current, now)
                spent = "" if seconds is None else f"{seconds:6.1f} s"
                console.print(f"{stage:9} {state:12} {spent:>8}  {text}", markup=False, highlight=False)


def _as_table(rows: list[tuple[str, str, float | None, str]]) -> Table:
    table = Table("stage", "state", "seconds", "last word", box=None, pad_edge=False)
    for stage, state, seconds, text in rows:
        colour = _COLOURS.get(state, "dim")
        table.add_row(stage, f"[{colour}]{state}[/]", "" if seconds is None else f"{seconds:.0f}", text)
    return table


def _numbers(values: dict[str, Any]) -> str:
    """The first few plain numbers, in words."""
    plain = [(key, value) for key, value in values.items() if isinstance(value, int | float)]
    return "  ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}" for key, value in plain[:_NUMBERS_SHOWN]
    )


def _reason(lines: list[str]) -> list[str]:
    """The sentence that the stage ended with, else the last lines of its log."""
    told = [line for line in lines if line and not line.startswith("::")]
    sentences = [line for line in told if line.startswith("error ")]
    return sentences[-1:] or told[-12:]
