"""The whole chain on a small slice of the real data, through a real Airflow, to an answer of the recall API.

The slice is a shop's own log, whose items have SKUs and no numbers.
Two runs: the first has a stage killed half-way and ends at a gate that fails; the second is `urm demo`, which reuses
that work, goes on all the same, and serves.
"""

import json
import os
import re
import signal
import time
from dataclasses import dataclass
from typing import Any

import duckdb
import httpx
import psutil
import pyarrow.parquet as pq
import pytest

from components.addresses import read_json
from components.client import Event, RecallClient
from components.config import load_config
from components.flow import STAGES
from components.local.round_trip import choose_visitor, go
from components.local.stack import DAG_ID
from components.storage import load_result
from tests.worlds import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

EXAMPLES = {"max_train_contexts": 200, "max_validation_examples": 30, "max_test_examples": 60}
STEPS = {"urm.num_layers": 1, "urm.max_steps": 6, "urm.eval_steps": 3, "urm.max_seconds": 30, "items.id_max_steps": 10}
SETTINGS = {"baseline.max_epochs": 1, "baseline.max_seconds": 10} | STEPS
SETTINGS |= {f"features.{name}": number for name, number in EXAMPLES.items()} | {"evaluation.bootstrap_samples": 400}
SETTINGS["evaluation.gate.min_lift"] = 10  # out of reach, so that the gate fails for certain
ATTRIBUTES = ["in_display", "in_mailer", "discounted"]  # what the tasks' filters name
KILLED = "sft"


@dataclass
class Finished:
    """A DAG run that has ended."""

    run_id: str
    run_dir: str
    run: dict[str, Any]
    tasks: dict[str, dict[str, Any]]

    def states(self) -> dict[str, str]:
        """State by stage."""
        return {stage: self.tasks[stage]["state"] for stage in STAGES}


def _stage_process(stage: str, run_dir: str) -> psutil.Process | None:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if stage in command and run_dir in command and "setpriv" not in command[0]:
            return process
    return None


def _finish(urm, conf: dict[str, Any], kill: str | None = None) -> Finished:
    """Trigger a run and wait for its end; SIGKILL one stage once it says that it is at work."""
    run_id = urm.airflow.trigger(DAG_ID, conf)
    run_dir = urm.settings.run_dir(run_id)
    client = urm.airflow
    while (run := client.run(DAG_ID, run_id))["state"] not in ("success", "failed"):
        if kill and read_json(f"{run_dir}/{kill}/progress.json") is not None:
            process = _stage_process(kill, run_dir)
            assert process is not None, f"stage {kill} ended before it could be killed"
            os.kill(process.pid, signal.SIGKILL)
            kill = None
        time.sleep(0.3)
    assert kill is None, f"stage {kill} never said that it is at work"
    return Finished(run_id, run_dir, run, client.tasks(DAG_ID, run_id))


@pytest.fixture(scope="module")
def small(urm, tmp_path_factory) -> list[str]:
    """Overrides: a small run of 60 households' purchases, as a shop without numbers would export them."""
    folder = tmp_path_factory.mktemp("shop")
    ingested = urm("ingest", "--run-dir", str(folder / "run"), "--set", "source.max_users=60")
    assert ingested.returncode == 0, ingested.stdout + ingested.stderr
    outputs = load_result(str(folder / "run"), "ingest").outputs
    attributes = [f"map_extract(attributes, '{name}')[1] AS {name}" for name in ATTRIBUTES]
    for name, files, columns in (
        ("events", f"{outputs['events']}/**/*.parquet", ["* EXCLUDE (item_id, attributes)", *attributes]),
        ("items", outputs["items"], ["* EXCLUDE (item_id, external_id)"]),
    ):
        rows = duckdb.read_parquet(files).project(", ".join([*columns, "'SKU-' || item_id AS sku"]))
        rows.write_parquet(f"{folder / name}.parquet")
    source = {name: f"{folder / name}.parquet" for name in ("events", "items")}
    source |= {"kind": "tables", "attributes": ATTRIBUTES}
    source |= {f"{name}_columns": {"item_id": "sku"} for name in ("event", "item")}
    return [f"{name}={json.dumps(value)}" for name, value in ({"source": source} | SETTINGS).items()]


@pytest.fixture(scope="module")
def options(small) -> list[str]:
    """The same for the command line."""
    return [option for override in small for option in ("--set", override)]


@pytest.fixture(scope="module")
def refused(urm, small) -> Finished:
    """A run whose SFT was killed once, and whose gate failed."""
    return _finish(urm, {"overrides": small}, kill=KILLED)


@pytest.fixture(scope="module")
def screen(urm, refused, options) -> str:
    """What `urm demo` prints for the same configuration, with leave to promote."""
    shown = urm("demo", "--promote-anyway", *options)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout


@pytest.fixture(scope="module")
def promoted(urm, screen) -> Finished:
    """The run that the demo triggered."""
    run_id = re.search(r"DAG run (\S+)", screen).group(1)
    client = urm.airflow
    return Finished(run_id, urm.settings.run_dir(run_id), client.run(DAG_ID, run_id), client.tasks(DAG_ID, run_id))


def _log(urm, finished: Finished, stage: str, try_number: int = 1) -> str:
    return "\n".join(urm.airflow.log_lines(DAG_ID, finished.run_id, stage, try_number))


def test_failed_gate_ends_in_a_clear_skip(urm, refused):
    expected = dict.fromkeys(STAGES, "success") | {"release": "skipped", "promote": "skipped"}
    assert refused.states() == expected, _log(urm, refused, "gate")
    assert refused.run["state"] == "success"


def test_clearing_what_a_failed_gate_skipped_skips_it_again(urm, refused):
    """Airflow asks the gate's verdict again; the run does not go on behind it."""
    cleared = {"dag_run_id": refused.run_id, "task_ids": ["release", "promote"], "only_failed": False, "dry_run": False}
    urm.airflow._send("POST", f"/dags/{DAG_ID}/clearTaskInstances", json=cleared)
    while urm.airflow.run(DAG_ID, refused.run_id)["state"] not in ("success", "failed"):
        time.sleep(0.3)
    tasks = urm.airflow.tasks(DAG_ID, refused.run_id)
    assert {stage: tasks[stage]["state"] for stage in STAGES} == refused.states()
    assert tasks["gate"]["start_date"] == refused.tasks["gate"]["start_date"]


def test_the_rendered_tab_shows_command_and_settings_without_secrets(urm, refused, options):
    shown = refused.tasks[KILLED]["rendered_fields"]
    assert shown["arguments"] == [KILLED, "--config", "complete_journey", "--run-dir", refused.run_dir, *options]
    assert shown["environment"]["URM_AIRFLOW_RUN_ID"] == refused.run_id
    assert shown["environment"]["URM_HOME"] == str(urm.home)
    assert not {"URM_AIRFLOW_PASSWORD", "URM_MLFLOW_URI", "URM_REDIS_URL"} & shown["environment"].keys()


def test_a_stage_killed_half_way_is_completed_by_the_retry(urm, refused):
    assert refused.tasks[KILLED]["try_number"] == 2
    assert "exited with return code -9" in _log(urm, refused, KILLED)
    assert load_result(refused.run_dir, KILLED) is not None
    others = {stage: task["try_number"] for stage, task in refused.tasks.items() if stage != KILLED}
    assert set(others.values()) <= {0, 1}, others


def test_the_reasons_stand_in_the_log_and_in_both_notes(urm, refused):
    reasons = read_json(load_result(refused.run_dir, "gate").outputs["verdict"])["reasons"]
    assert reasons
    log = _log(urm, refused, "gate")
    for text in (log, refused.run["note"], refused.tasks["gate"]["note"]):
        assert "FAILED" in text
        assert "release and promote are skipped" in text
        assert reasons[0][:200] in text
    tracked = read_json(f"{refused.run_dir}/tracking.json")
    assert f"/runs/{tracked['run_id']}" in refused.run["note"]


def test_airflow_leads_to_mlflow_and_back(urm, refused):
    import mlflow

    tracked = read_json(f"{refused.run_dir}/tracking.json")
    links = urm.airflow.extra_links(DAG_ID, refused.run_id, "evaluate")
    assert f"/#/experiments/{tracked['experiment_id']}/runs/{tracked['run_id']}" in links["MLflow run"]
    mlflow.set_tracking_uri(urm.settings.mlflow_uri)
    run = mlflow.get_run(tracked["run_id"])
    assert run.data.tags["airflow.run_id"] == refused.run_id
    assert run.data.tags["airflow.url"].startswith(urm.settings.airflow_url)


def test_mlflow_has_nested_runs_of_the_stages_that_train_and_evaluate(urm, refused):
    import mlflow

    mlflow.set_tracking_uri(urm.settings.mlflow_uri)
    tracked = read_json(f"{refused.run_dir}/tracking.json")
    children = mlflow.search_runs(
        [tracked["experiment_id"]], f"tags.`mlflow.parentRunId` = '{tracked['run_id']}'", output_format="list"
    )
    finished = {run.data.tags["urm.stage"] for run in children if run.info.status == "FINISHED"}
    assert {"baseline", "sft", "evaluate"} <= finished


def test_a_second_run_reuses_what_has_not_changed(promoted, refused):
    assert promoted.states() == dict.fromkeys(STAGES, "success")
    for stage, spec in STAGES.items():
        result = load_result(promoted.run_dir, stage)
        assert (result.reused_from is not None) is spec.reusable, stage


def test_the_final_screen(urm, screen, promoted):
    metrics = load_result(promoted.run_dir, "evaluate").metrics
    for name in metrics["tasks"]:
        assert re.search(rf"{name} .*%", screen), name
    for title in ("larity", "history", "kNN", "attention", "URM", "lift", "interval"):
        assert title in screen
    assert "Gate: NOT PASSED" in screen
    assert "THE MODEL DID NOT PASS" in " ".join(screen.split())
    deployment = read_json(load_result(promoted.run_dir, "promote").outputs["deployment"])
    assert f"Release {deployment['release']}  alias champion" in screen
    assert re.search(r"Live: user \S+, purchase of “.*”; new recall after \d+\.\d+ s", screen)
    for address in (urm.settings.airflow_url, urm.settings.mlflow_uri, f"{urm.settings.api_url}/docs"):
        assert address in screen


def test_progress_without_a_terminal_is_plain_lines(screen):
    for stage in STAGES:
        assert re.search(rf"^{stage} +success +[\d.]+ s", screen, re.MULTILINE), stage
    assert "reused from an earlier run" in screen
    assert "\x1b[" not in screen


def test_model_versions_have_their_aliases(urm, promoted):
    import mlflow

    mlflow.set_tracking_uri(urm.settings.mlflow_uri)
    client = mlflow.MlflowClient()
    aliases = client.get_registered_model("urm").aliases
    assert "champion" in aliases


def test_the_api_serves_the_release(urm, promoted):
    deployment = read_json(load_result(promoted.run_dir, "promote").outputs["deployment"])
    with httpx.Client(base_url=urm.settings.api_url, timeout=10) as client:
        ready = client.get("/readyz")
        assert ready.json()["release"] == deployment["release"]
        assert client.get("/docs").is_success


def test_an_event_changes_the_users_recall(urm, promoted):
    config = load_config(urm.settings.configs_dir / "complete_journey.yaml")
    visitor = choose_visitor(promoted.run_dir, config, urm.settings)
    answer, seconds = go(visitor, urm.settings.api_url)
    assert answer["source"] == "model"
    assert answer["user_id"] == visitor.user_id
    assert len(answer["items"]) == 10
    assert all(item["title"] for item in answer["items"])
    assert seconds < 30


def test_a_shop_without_numbers_names_items_by_its_skus(urm, promoted):
    """From the text of its log through event, history and model to the answer."""
    table = pq.read_table(load_result(promoted.run_dir, "validate").outputs["items"], columns=["external_id", "title"])
    titles = dict(zip(*table.to_pydict().values(), strict=True))
    with RecallClient(urm.settings.api_url) as client:
        bought = [item.external_id for item in client.recall("a new user", "repurchase", k=50).items[-2:]]
        events = [Event(user_id="a new user", external_id=sku) for sku in bought]
        assert client.send(events).accepted == 2
        wait_until(lambda: client.recall("a new user", "repurchase").event_id == events[-1].event_id)
        answer = client.recall("a new user", "repurchase")
    assert answer.source == "model"
    assert set(bought) <= {item.external_id for item in answer.items}
    for item in answer.items:
        assert item.external_id.startswith("SKU-") and item.title == titles[item.external_id]
    shown = urm("recall", "show", "a new user", "--task", "repurchase").stdout
    assert all(item.external_id in shown for item in answer.items)
    assert all(f"purchase {sku} " in shown for sku in bought)  # found in the catalogue by its number


def _search(client: RecallClient, user_id: str, words: str) -> set[int]:
    """Items of the model's answer to a search, once it is there."""
    client.send([Event(user_id=user_id, behavior="search", query=words)])
    wait_until(lambda: client.recall(user_id, task="text_query").query == words)
    answer = client.recall(user_id, task="text_query", k=50)
    assert answer.source == "model"
    return {item.item_id for item in answer.items}


def test_words_that_no_item_has_are_answered_by_what_they_mean(urm, promoted):
    """From the event through worker and encoder to the result; by their words alone both would be answered alike."""
    searches = ("a hungry kitty", "a fizzy thirst quencher")
    config = load_config(urm.settings.configs_dir / "complete_journey.yaml")
    visitor = choose_visitor(promoted.run_dir, config, urm.settings)
    items = pq.read_table(load_result(promoted.run_dir, "validate").outputs["items"], columns=["title", "category"])
    texts = str(items.to_pydict()).lower()
    assert not any(word in texts for words in searches for word in words.split() if len(word) > 1)
    with RecallClient(urm.settings.api_url) as client:
        found = [_search(client, visitor.user_id, words) for words in searches]
    assert len(found[0]) == 50
    assert found[0] != found[1]


def test_a_mistake_in_the_configuration_shows_before_anything_starts(urm, promoted):
    refused = urm("demo", "--set", "source.max_users=-1")
    assert refused.returncode == 2
    assert "field 'source.max_users': expected" in " ".join(refused.stderr.split())


def test_a_mistake_in_the_data_fails_at_once_with_its_reason(urm, promoted, tmp_path):
    """Exit code 2 of a stage: no retry; the demo prints the sentence from the task's log."""
    shown = urm("demo", "--set", f"source.data_dir={tmp_path}")
    assert shown.returncode == 1
    assert "ingest failed" in shown.stdout
    assert str(tmp_path) in shown.stdout
    run_id = re.search(r"DAG run (\S+)", shown.stdout).group(1)
    assert urm.airflow.tasks(DAG_ID, run_id)["ingest"]["try_number"] == 1


def test_status_lists_what_runs(urm, promoted):
    shown = urm("status").stdout
    for service in ("redis", "mlflow", "airflow-api", "airflow-scheduler", "recall-worker", "recall-api"):
        assert service in shown
    assert "down" not in shown
