"""Runs the back-fill as a process of this machine; its arguments and figures, which the Job of a cluster has, too."""

import json
from collections.abc import Collection
from typing import Any

from airflow.sdk import Context

from dags.common.outcome import write_notes
from dags.common.process import UrmProcessOperator

COUNTS = ("done", "total", "stored", "current", "failed")


def backfill_arguments(context: Context, jinja_env: Any = None) -> list[str]:
    """Arguments of `urm`, from the params of the DAG run; all users in one process."""
    params = context["params"]
    config = params["config"] or _promoted_config(context)
    chosen = [f"--config={config}"] if config else []  # else URM_CONFIG decides, where the command runs
    return ["recall", "backfill", *chosen, f"--rate={params['rate']:g}"]


class BackfillProcessOperator(UrmProcessOperator):
    """`urm recall backfill` for all users; the run's note says what came of them."""

    def execute(self, context: Context) -> None:
        """Run the command to its end.

        Raises:
            AirflowFailException: The input is wrong; not tried again.
            AirflowException: Any other failure; the next try goes on where this one was.
        """
        super().execute(context)
        if figures := read_figures(self.last_line):
            write_notes(f"{describe(sum_up([figures]))}.", context)


def read_figures(line: str) -> dict[str, Any]:
    """Figures of a shard, from a line of its log; empty where the line has none."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and found.keys() >= set(COUNTS) else {}


def sum_up(shards: Collection[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several shards in one."""
    counts = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    rate = sum(shard["users_per_second"] for shard in shards if shard["done"] < shard["total"])
    return {**counts, "users_per_second": rate, "release": next((shard["release"] for shard in shards), "")}


def describe(figures: dict[str, Any]) -> str:
    """The figures in words."""
    left, rate = figures["total"] - figures["done"], figures["users_per_second"]
    text = (
        f"release {figures['release']}: {figures['done']:,} of {figures['total']:,} users, {figures['stored']:,} "
        f"computed, {figures['current']:,} had results, {figures['failed']:,} failed"
    )
    return text + (f"; {rate:,.1f} users per second, {left / rate / 3600:.1f} h left" if left and rate else "")


def _promoted_config(context: Context) -> str:
    """The configuration of the promotion that this run follows; empty where nothing says which."""
    events = [event for of_asset in (context.get("triggering_asset_events") or {}).values() for event in of_asset]
    return next((str(event.extra["config"]) for event in reversed(events) if event.extra.get("config")), "")
