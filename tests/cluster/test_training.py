"""Training as a person sees it on a cluster: every stage a pod, through a real Airflow, and what goes wrong meanwhile.

Stand-ins without a cluster: tests/dags, tests/e2e.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import fsspec
import mlflow
import pandas as pd
import pytest

from components.client import RecallClient
from components.flow import STAGES
from tests.cluster.airflow import BACKFILL, ENDED, STUDY, TRAINING
from tests.cluster.flow import (
    SMALL,
    Training,
    create_secret,
    list_objects,
    open_flow,
    record,
    sentence,
)
from tests.cluster.world import (
    API,
    PASSWORD,
    Kubectl,
    Object,
    pause_until,
    store_variables,
)

pytestmark = pytest.mark.timeout(1200)

NUM_STEPS = 30
SHORT, LONG = f"urm.max_steps={NUM_STEPS}", "urm.max_steps=5000"
GPU = "nvidia.com~1gpu"  # in a JSON pointer


@pytest.fixture(scope="module")
def training(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """The flow on a cluster."""
    with open_flow(tmp_path_factory.mktemp("airflow")) as found:
        yield found


@pytest.fixture(scope="module")
def whole_run(training: Training) -> str:
    """Id of a run of `recall_training` that has ended; every stage computes, and the gate lets everything pass."""
    training.airflow.unpause(BACKFILL)
    conf = {"overrides": [*SMALL, SHORT], "force": True, "promote_anyway": True}
    run_id = training.airflow.client.trigger(TRAINING, conf)

    def has_ended(task_id: str) -> bool:
        failed = training.airflow.run(TRAINING, run_id)["state"] == "failed"
        return failed or training.airflow.state(run_id, task_id) == "success"

    pause_until(lambda: has_ended("gate"), 900)
    training.kubectl("scale", "deployment", "--all", "--replicas=1")
    pause_until(lambda: training.airflow.run(TRAINING, run_id)["state"] in ("success", "failed"), 500)
    return run_id


def test_a_promotion_gives_every_known_user_results(training: Training, whole_run: str) -> None:
    start, (run_id,) = time.monotonic(), training.airflow.runs(BACKFILL)
    pause_until(lambda: training.airflow.run(BACKFILL, run_id)["state"] in ENDED, 500)
    run, task = training.airflow.run(BACKFILL, run_id), training.airflow.client.tasks(BACKFILL, run_id)["backfill"]
    assert (run["state"], run["run_type"], task["try_number"]) == ("success", "asset_triggered", 1)
    print(run["note"], task["rendered_fields"]["job"], sep="\n")
    figures = re.search(r"(\d+) of (\d+) users, (\d+) computed, (\d+) had results, 0 failed", run["note"])
    assert figures is not None
    done, total, computed, current = map(int, figures.groups())
    assert total == done == computed + current > 20
    assert "--shards=2" in str(task["rendered_fields"]["job"])
    contexts = pd.read_parquet(training.result(whole_run, "features")["outputs"]["contexts"], columns=["user_id"])
    with RecallClient(f"http://{training.kubectl.address(API)}:8000", training.token) as api:
        answers = api.recall_many(sorted(set(contexts["user_id"])))
    assert {answer.source for answer in answers} == {"model"}
    record("`recall_backfill` after the promotion", f"{total} users read through the API", start)
    training.kubectl("delete", "job", "recall-backfill")  # its time to live is a day


def test_every_stage_is_a_pod_of_its_class_and_leaves_nothing(training: Training, whole_run: str) -> None:
    run, tasks = training.airflow.run(TRAINING, whole_run), training.airflow.client.tasks(TRAINING, whole_run)
    assert {name: (task["state"], task["try_number"]) for name, task in tasks.items()} == dict.fromkeys(
        STAGES, ("success", 1)
    )
    pods = {stage: len(training.started(stage)) for stage in STAGES}
    assert pods == dict.fromkeys(STAGES, 1)
    training.wait_until_gone()
    assert list_objects(training.kubectl) == training.found
    assert leftovers(training, whole_run) == []
    assert "Gate" in run["note"]
    start = time.monotonic() - run["duration"]
    record("a whole run", f"{sum(pods.values())} pods, all stages succeed, the release serves", start)
    training.kubectl("scale", "deployment", "--all", "--replicas=0")


def leftovers(training: Training, run_id: str) -> list[str]:
    """Temporary files of a run in the store."""
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    paths = store.find(training.run_dir(run_id), withdirs=True)
    return [path for path in paths if any(part.startswith((".", "tmp")) for part in path.split("/")[2:])]


def test_the_ui_shows_the_command_and_no_secret(training: Training, whole_run: str) -> None:
    shown = training.airflow.task(whole_run)["rendered_fields"]
    options = [option for override in [*SMALL, SHORT] for option in ("--set", override)]
    command = ["sft", "--config", "complete_journey", "--run-dir", training.run_dir(whole_run), *options, "--force"]
    assert shown["arguments"] == command
    assert PASSWORD not in str(shown)


@pytest.fixture(scope="module")
def long_run(training: Training, whole_run: str) -> str:
    """Id of a run whose `sft` trains for a while; what the first run has made is reused."""
    training.change_pods()
    run_id = training.airflow.client.trigger(TRAINING, {"overrides": [*SMALL, LONG]})
    training.wait_for_pod(seconds=600)
    pause_until(lambda: training.saved_steps(run_id), 240)
    return run_id


def test_a_line_of_a_pod_is_in_the_ui_within_seconds(training: Training, long_run: str) -> None:
    pod = training.wait_for_pod()["metadata"]["name"]
    start = time.monotonic()
    seen: dict[str, float] = {}
    delays: list[float] = []
    while len(delays) < 3 and time.monotonic() - start < 120:
        for line in training.kubectl("logs", pod, "--tail=5", "--timestamps").splitlines():
            seen.setdefault(line.partition(" ")[2].strip(), datetime.fromisoformat(line.partition(" ")[0]).timestamp())
        shown = training.airflow.log(long_run, "sft", 1)
        for line in [line for line in seen if "step=" in line and line in shown]:
            delays.append(time.time() - seen.pop(line))
        time.sleep(0.5)
    assert len(delays) >= 3, training.airflow.log(long_run, "sft", 1)[-2000:]
    assert min(delays) < 15
    record("`sft` runs, and its log is read through Airflow", f"a line is there after {min(delays):.0f} to "
           f"{max(delays):.0f} s", start)  # fmt: skip


def test_scheduler_and_triggerer_killed(training: Training, long_run: str) -> None:
    pod = training.wait_for_pod()["metadata"]
    start, before = time.monotonic(), training.started("sft")
    training.airflow.kill("airflow-scheduler", "airflow-triggerer")
    time.sleep(5)
    training.airflow.start("airflow-scheduler", "airflow-triggerer")
    lines = training.airflow.log(long_run, "sft", 1).count("training URM")
    pause_until(lambda: training.airflow.log(long_run, "sft", 1).count("training URM") > lines, 180)
    record("scheduler and triggerer killed, and started again", "the same pod; its log goes on", start)
    assert training.wait_for_pod()["metadata"]["uid"] == pod["uid"]
    assert training.started("sft") == before
    assert training.airflow.state(long_run) == "deferred"


def delete(training: Training, pod: Object) -> None:
    training.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")


def kill(training: Training, pod: Object) -> None:
    training.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false", "--force", "--grace-period=0")


def evict(training: Training, pod: Object) -> None:
    name, namespace = pod["metadata"]["name"], training.kubectl.namespace
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
    address = f"/api/v1/namespaces/{namespace}/pods/{name}/eviction"
    training.kubectl("create", "--raw", address, "--filename", "-", given=json.dumps(eviction))


def drain(training: Training, pod: Object) -> None:
    node, run = pod["spec"]["nodeName"], pod["metadata"]["labels"]["run_id"]  # drain looks into all namespaces
    training.kubectl("cordon", node)
    try:
        training.kubectl("drain", node, "--pod-selector", f"run_id={run}", "--force", "--delete-emptydir-data")
        training.wait_for_pod(other_than=[pod["metadata"]["name"]])
    finally:
        training.kubectl("uncordon", node)


DISRUPTIONS = {"deleted": delete, "deleted without grace": kill, "evicted by API": evict, "its node drained": drain}


@pytest.mark.parametrize("case", DISRUPTIONS)
def test_a_disrupted_pod_is_followed_by_one_that_goes_on(training: Training, long_run: str, case: str) -> None:
    pod = training.wait_for_pod()
    before, name = training.started("sft"), pod["metadata"]["name"]
    saved = max(training.saved_steps(long_run))
    start = time.monotonic()
    DISRUPTIONS[case](training, pod)
    successor = training.wait_for_pod(other_than=[name])["metadata"]["name"]
    step = training.resumed_step(successor)
    record(f"pod of `sft` {case}", "another pod in the same try", start, resumed=f"step {step}, {saved} saved before")
    assert step >= saved > 0
    assert training.started("sft") - before == {successor}
    assert training.airflow.task(long_run)["try_number"] == 1
    pause_until(lambda: max(training.saved_steps(long_run), default=0) > step, 180)


def test_a_run_marked_as_failed_leaves_no_pod(training: Training, long_run: str) -> None:
    """The tests below clear tasks of the first run, which waits while another one is at work."""
    start = time.monotonic()
    training.airflow.end_run(TRAINING, long_run)
    training.wait_until_gone()
    record("the run marked as failed in the UI", "the pod is deleted", start)


def test_a_disrupted_training_ends_in_its_first_try_with_one_curve(training: Training, whole_run: str) -> None:
    earlier = {run.info.run_id for run in tracked_runs(training, whole_run)}
    pod, number = training.begin(whole_run)
    pause_until(lambda: training.saved_steps(whole_run), 120)
    start = time.monotonic()
    training.kubectl("delete", "pod", pod, "--wait=false")
    task = training.airflow.wait(whole_run)
    assert (task["state"], task["try_number"]) == ("success", number)
    summary = training.result(whole_run, "sft")["metrics"]["training"]
    (run,) = [run for run in tracked_runs(training, whole_run) if run.info.run_id not in earlier]
    curve = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert summary["steps"] == NUM_STEPS and {point.step for point in curve} == set(range(10, NUM_STEPS + 1, 10))
    assert leftovers(training, whole_run) == []
    happened = f"{NUM_STEPS} steps, one MLflow run, its loss at {len({point.step for point in curve})} of them"
    record("pod of `sft` deleted, and the training to its end", happened, start)


def tracked_runs(training: Training, run_id: str) -> list[mlflow.entities.Run]:
    """MLflow runs of the `sft` of a DAG run."""
    mlflow.set_tracking_uri(training.airflow.environment["URM_MLFLOW_URI"])
    chosen = f"tags.airflow.run_id = '{run_id}' and tags.urm.stage = 'sft'"
    found = mlflow.search_runs(search_all_experiments=True, filter_string=chosen, output_format="list")
    return list(found)


@pytest.mark.parametrize("state", ["failed", "success"])
def test_a_task_marked_in_the_ui_leaves_no_pod(training: Training, whole_run: str, state: str) -> None:
    training.begin(whole_run)
    start = time.monotonic()
    training.airflow.mark(whole_run, "sft", state)
    training.wait_until_gone("sft")
    record(f"marked as {state} in the UI", "the pod is deleted", start)
    assert training.airflow.state(whole_run) == state


def test_a_task_cleared_while_it_runs_goes_on_with_one_pod(training: Training, whole_run: str) -> None:
    _, tries = training.begin(whole_run)
    pause_until(lambda: training.saved_steps(whole_run), 60)
    start = time.monotonic()
    training.airflow.clear(whole_run, "sft")
    task = training.airflow.wait(whole_run)
    assert task["state"] == "success"
    assert task["try_number"] == tries + 1
    record("cleared in the UI while it runs", "succeeds in the next try", start, task["try_number"] - tries)
    training.wait_until_gone("sft")


def fail_and_correct(training: Training, run_id: str, task_id: str, number: int, correct: Callable[[], None]) -> str:
    """Wait until a try has failed, correct the cause, and wait for the success of the next; what the first one said."""
    pause_until(lambda: training.airflow.state(run_id, task_id) == "up_for_retry", 240)
    correct()
    task = training.airflow.wait(run_id, task_id)
    assert (task["state"], task["try_number"]) == ("success", number + 1)
    return sentence(training, run_id, task_id, number)


def test_memory_too_small_is_a_failure_with_its_remedy(training: Training, whole_run: str) -> None:
    start, tries = time.monotonic(), training.clear(whole_run, "baseline", memory="300Mi")
    said = fail_and_correct(training, whole_run, "baseline", tries + 1, training.change_pods)
    record("`memory` of the table too small, then raised", said, start, 1)
    assert "at most 300Mi of memory, got OOMKilled; raise `memory` in the table of pods" in said


def test_a_wrong_secret_is_retried_and_a_corrected_one_succeeds(training: Training, whole_run: str) -> None:
    right = store_variables(f"http://{training.kubectl.address('s3')}:5000")
    create_secret(training.kubectl, "urm-tracking", right | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
    start, tries = time.monotonic(), training.clear(whole_run, "evaluate")

    def correct() -> None:
        create_secret(training.kubectl, "urm-tracking", right)

    said = fail_and_correct(training, whole_run, "evaluate", tries + 1, correct)
    record("secret with a wrong address of the store, then corrected", said, start, 1)
    assert "127.0.0.1:9" in said


def test_an_image_and_a_secret_that_are_not_there(training: Training, whole_run: str) -> None:
    right = store_variables(f"http://{training.kubectl.address('s3')}:5000")
    training.wait_until_idle(whole_run)
    start = time.monotonic()
    tries = {name: training.airflow.task(whole_run, name)["try_number"] for name in ("baseline", "sft")}
    training.change_pods(baseline={"image": "urm-pipeline:missing"})
    training.kubectl("delete", "secret", "urm-training")
    try:
        training.airflow.clear(whole_run, "baseline", "sft")
        found = {name: training.airflow.wait(whole_run, name) for name in tries}
    finally:
        create_secret(training.kubectl, "urm-training", right)
        training.change_pods()
    for name, case, words in (
        ("baseline", "image", "urm-pipeline:missing"),
        ("sft", "secret", 'secret "urm-training"'),
    ):
        said = sentence(training, whole_run, name, tries[name] + 1)
        record(f"{case} that is not there", said, start, found[name]["try_number"] - tries[name] - 1)
        assert (found[name]["state"], found[name]["try_number"]) == ("failed", tries[name] + 1)
        assert words in said
    training.wait_until_gone()


def test_a_gpu_is_waited_for_and_an_image_without_cuda_fails_at_once(training: Training, whole_run: str) -> None:
    start = time.monotonic()
    tries = training.clear(whole_run, gpus=1)
    pause_until(lambda: "nvidia.com/gpu" in training.airflow.log(whole_run, "sft", tries + 1), 120)
    (pod,) = training.pods("sft")
    assert pod["status"]["phase"] == "Pending"
    node = training.kubectl.read("nodes")["items"][0]["metadata"]["name"]
    patch = [{"op": "add", "path": f"/status/{place}/{GPU}", "value": "1"} for place in ("capacity", "allocatable")]
    patch_node(training, node, patch)
    try:
        task = training.airflow.wait(whole_run)
    finally:
        patch_node(training, node, [{"op": "remove", "path": step["path"]} for step in patch])
    said = sentence(training, whole_run, "sft", tries + 1)
    record("one GPU asked for; a node has it later", f"waits, starts there, and says: {said}", start)
    assert (task["state"], task["try_number"]) == ("failed", tries + 1)
    assert "CUDA" in said


def patch_node(training: Training, node: str, patch: list[dict[str, str]]) -> None:
    """Change the status of a node."""
    training.kubectl("patch", "node", node, "--subresource=status", "--type=json", "--patch", json.dumps(patch))


def test_a_full_cluster_is_waited_for_up_to_a_limit(training: Training, whole_run: str) -> None:
    """With the limit of 0.01 hours; the default is a day."""
    nodes = [node["metadata"]["name"] for node in training.kubectl.read("nodes")["items"]]
    start = time.monotonic()
    try:
        for node in nodes:
            fill(training, node)
        tries = training.clear(whole_run, cpu="1200m", queue_hours=0.01)
        assert training.airflow.wait(whole_run)["state"] == "failed"
        said = sentence(training, whole_run, "sft", tries + 1)
        record("no room on any node for 36 s, `queue_hours` 0.01", said, start)
        assert "expected a node within 0.01 h" in said
        training.clear(whole_run, cpu="1200m")
        pause_until(lambda: any(pod["status"]["phase"] == "Pending" for pod in training.pods("sft")), 60)
    finally:
        training.kubectl("delete", "pod", "--selector", "app=filler", "--force", "--grace-period=0")
    start = time.monotonic()
    task = training.airflow.wait(whole_run)
    assert (task["state"], task["try_number"]) == ("success", tries + 2)
    record("room again", "the waiting pod starts", start)


def fill(training: Training, node: str) -> None:
    """A pod that asks for most of a node's processors."""
    free = training.kubectl.read("node", node)["status"]["allocatable"]["cpu"]
    pod = json.loads(training.kubectl("get", "pod", "s3", "--output", "json"))
    container = pod["spec"]["containers"][0] | {"command": ["sleep", "3600"]}
    container["resources"]["requests"]["cpu"] = f"{(int(free) * 1000 if free.isdigit() else int(free[:-1])) - 1000}m"
    for name in ("readinessProbe", "volumeMounts"):
        container.pop(name)
    spec = {key: pod["spec"][key] for key in ("securityContext", "automountServiceAccountToken")}
    given = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"filler-{node}", "labels": {"app": "filler"}},
        "spec": spec | {"nodeName": node, "containers": [container]},
    }  # fmt: skip
    training.kubectl("apply", "--filename", "-", given=json.dumps(given))


def test_a_missing_right_is_said_in_one_sentence(training: Training, whole_run: str) -> None:
    rules = training.kubectl.read("role", "urm-airflow")["rules"]
    less = [rule | {"verbs": [verb for verb in rule["verbs"] if verb != "create"]} for rule in rules]
    start = time.monotonic()
    training.kubectl("patch", "role", "urm-airflow", "--patch", json.dumps({"rules": less}))
    try:
        tries = training.clear(whole_run)
        task = training.airflow.wait(whole_run)
    finally:
        training.kubectl("patch", "role", "urm-airflow", "--patch", json.dumps({"rules": rules}))
    said = sentence(training, whole_run, "sft", tries + 1)
    record("Airflow may not create pods", said, start, task["try_number"] - tries - 1)
    assert (task["state"], task["try_number"]) == ("failed", tries + 1)
    assert 'cannot create resource "pods"' in said


def test_a_mistake_in_the_configuration_fails_at_once(training: Training, whole_run: str) -> None:
    training.airflow.end_run(TRAINING, whole_run)
    start = time.monotonic()
    run_id = training.airflow.client.trigger(TRAINING, {"overrides": [*SMALL, "urm.max_steps=-1"]})
    task = training.airflow.wait(run_id, "ingest")
    said = sentence(training, run_id, "ingest", 1)
    record("an override that is wrong (exit code 2)", said, start, task["try_number"] - 1)
    assert (task["state"], task["try_number"]) == ("failed", 1)
    assert "urm.max_steps" in said
    pause_until(lambda: training.airflow.run(TRAINING, run_id)["state"] == "failed", 60)


def test_the_variants_of_a_study_are_pods_side_by_side(training: Training, whole_run: str) -> None:
    start = time.monotonic()
    conf = {"grid": "packing", "overrides": [*SMALL, "urm.max_seconds=5"]}
    run_id = training.airflow.client.trigger(STUDY, conf)
    most = 0

    def has_ended() -> bool:
        nonlocal most
        most = max(most, sum(pod["status"]["phase"] == "Running" for pod in training.pods("variant")))
        return training.airflow.run(STUDY, run_id)["state"] in ("success", "failed")

    pause_until(has_ended, 800)
    assert training.airflow.run(STUDY, run_id)["state"] == "success"
    assert most == 2
    pods = {name: len(training.started(name)) for name in ("reference", "variant", "summary")}
    assert pods == {"reference": 2, "variant": 2, "summary": 1}
    record("`ablation_study` of two variants and two seeds", f"{sum(pods.values())} pods, two at a time", start)


def test_nothing_is_left_behind(training: Training, whole_run: str) -> None:
    training.wait_until_gone()
    assert list_objects(training.kubectl) == training.found
    files = [path for path in (training.pods_file.parent / "temporary").rglob("*") if path.is_file()]
    # The client of the cluster writes the certificate of its authority to a file, which it removes unless it is killed.
    assert [path.read_text() for path in files if "BEGIN CERTIFICATE" not in path.read_text()] == []
