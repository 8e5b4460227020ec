"""The whole chain on one machine: services up, a DAG run through Airflow's API, the results, a live round trip."""

import time
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.markup import escape

from components.addresses import read_json
from components.config import RunConfig
from components.exceptions import UrmError
from components.local.progress import RunWatch
from components.local.round_trip import choose_visitor, go, print_round_trip
from components.local.screen import print_comparison, print_release, print_verdict
from components.local.services import Stack
from components.local.stack import DAG_ID, up
from components.settings import Settings


class DemoError(UrmError):
    """A task of the demo's run failed; the reason has been printed."""


def run_demo(settings: Settings, console: Console, conf: dict[str, Any], config: RunConfig) -> None:
    """Run the demo; `conf` are the params of the DAG run, `config` is the configuration that they name.

    Raises:
        UrmError: Services, the run, or the round trip failed.
    """
    start = time.monotonic()
    console.rule("[bold]services", align="left")
    stack = up(
        settings, lambda text: console.print(f"[dim]{time.monotonic() - start:5.1f} s[/]  {text}"), conf["config"]
    )
    console.rule("[bold]chain", align="left")
    for active in stack.airflow.active_runs(DAG_ID):
        console.print(f"DAG run {active} has not ended; this one waits for it, or stop that one in Airflow")
    run_id = stack.airflow.trigger(DAG_ID, conf)
    run_dir = settings.run_dir(run_id)
    console.print(f"DAG run {run_id}\n{stack.url('airflow-api')}/dags/{DAG_ID}/runs/{quote(run_id)}")
    watch = RunWatch(stack.airflow, DAG_ID, run_id, run_dir)
    if watch.follow(console) == "failed":
        _print_failures(console, watch)
        raise DemoError(f"DAG run {run_id} failed after {time.monotonic() - start:.0f} s; see above for the reason.")
    console.rule("[bold]results", align="left")
    print_comparison(console, run_dir, config.evaluation.k)
    print_verdict(console, run_dir, bool(conf["promote_anyway"]))
    if watch.states()["promote"] == "success":
        print_release(console, run_dir)
        visitor = choose_visitor(run_dir, config, settings)
        if visitor is not None:
            token = settings.api_token.get_secret_value()
            print_round_trip(console, visitor, *go(visitor, stack.url("recall-api"), token))
        else:
            console.print("no live round trip: every task needs a query, or the user chosen had every popular item")
    _print_addresses(console, stack, run_dir)
    console.print(f"{time.monotonic() - start:.0f} s in all; the services stay up until [bold]make down[/]")


def _print_failures(console: Console, watch: RunWatch) -> None:
    for task, lines in watch.failures().items():
        console.print(f"\n[bold red]{task} failed[/]")
        for line in lines:
            console.print(f"  {escape(line)}", highlight=False)


def _print_addresses(console: Console, stack: Stack, run_dir: str) -> None:
    user, password = stack.airflow.username, stack.airflow.password
    tracked = read_json(f"{run_dir}/tracking.json")
    mlflow = stack.url("mlflow")
    if tracked:
        mlflow = Settings(mlflow_uri=mlflow).run_page(tracked["experiment_id"], tracked["run_id"])
    console.rule("[bold]look around", align="left")
    console.print(f"Airflow     {stack.url('airflow-api')}  user {user}  password {password}", highlight=False)
    console.print(f"MLflow      {mlflow}", highlight=False)
    console.print(f"Recall API  {stack.url('recall-api')}/docs", highlight=False)
