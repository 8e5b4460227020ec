"""The pod of a stage, as it would be sent to Kubernetes, and what becomes of its task when it ends."""

import asyncio
import json
import re
from datetime import datetime
from functools import partial
from types import SimpleNamespace

import pytest

from components.flow import STAGES
from components.settings import Settings, get_settings
from tests.k8s import policies, rendering
from tests.k8s.rendering import needs_kubectl
from tests.worlds import pods
from tests.worlds.pods import pod_server

__all__ = ["pod_server"]

SETTINGS = Settings(executor="kubernetes", image="registry.example/urm:1.2.3", namespace="recommend")


@pytest.fixture
def render_pod(home, render, monkeypatch):
    monkeypatch.setenv("URM_RUNS_URI", "s3://bucket/runs")
    monkeypatch.setenv("URM_AIRFLOW_URL", "http://airflow.example")
    from kubernetes.client import ApiClient

    from dags.common.tasks import stage_task

    def make(stage, settings=SETTINGS, **params):
        operator, context = render(stage_task(stage, settings), **params)
        operator._get_ti_pod_labels = lambda *_, **__: {"dag_id": "recall_training", "task_id": stage}
        return ApiClient().sanitize_for_serialization(operator.build_pod_request_obj(context, dry_run=True))

    return make


def test_command_line(render_pod):
    container = render_pod("ingest", overrides=["source.max_users=150"], force=True)["spec"]["containers"][0]
    assert container["command"] == ["urm"]
    run_dir = "s3://bucket/runs/manual__2026-11-25T10-00-00-00-00"
    options = ["--config", "complete_journey", "--run-dir", run_dir, "--set", "source.max_users=150", "--force"]
    assert container["args"] == ["ingest", *options]
    assert container["image"] == "registry.example/urm:1.2.3"


def test_the_rendered_tab_shows_arguments_and_environment(home, render):
    from dags.common.tasks import stage_task

    task, _ = render(stage_task("release", SETTINGS), promote_anyway=True)
    assert {"image", "cmds", "arguments", "env_vars"} <= set(task.template_fields)
    assert task.cmds == ["urm"]
    assert (task.arguments[0], task.arguments[-1]) == ("release", "--promote-anyway")
    assert task.env_vars["URM_AIRFLOW_RUN_ID"] == "manual__2026-11-25T10:00:00+00:00"


def test_only_release_is_told_to_go_on_anyway(render_pod):
    pods = {stage: render_pod(stage, promote_anyway=True)["spec"] for stage in ("gate", "release", "promote")}
    told = [stage for stage, spec in pods.items() if "--promote-anyway" in spec["containers"][0]["args"]]
    assert told == ["release"]


def test_environment_leads_back_to_airflow_and_to_the_cluster_settings(render_pod):
    container = render_pod("encode")["spec"]["containers"][0]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert values["URM_AIRFLOW_DAG_ID"] == "recall_training"
    assert values["URM_AIRFLOW_RUN_ID"] == "manual__2026-11-25T10:00:00+00:00"
    assert values["URM_AIRFLOW_URL"] == "http://airflow.example"


def test_sft_alone_asks_for_a_gpu_and_uses_it_or_fails(render_pod):
    containers = {stage: render_pod(stage)["spec"]["containers"][0] for stage in STAGES}
    with_gpu = {stage for stage in STAGES if "nvidia.com/gpu" in containers[stage]["resources"]["limits"]}
    devices = {variable["value"] for variable in containers["sft"]["env"] if variable["name"] == "URM_DEVICE"}
    others = [variable["name"] for stage in STAGES if stage != "sft" for variable in containers[stage]["env"]]
    assert (with_gpu, devices) == ({"sft"}, {"cuda"}) and "URM_DEVICE" not in others


def test_a_pod_ends_with_its_task_and_is_never_restarted(render_pod):
    spec = render_pod("gate")["spec"]
    assert spec["activeDeadlineSeconds"] == 600
    assert spec["restartPolicy"] == "Never"


def test_the_template_hardens_the_pod(render_pod):
    pod = render_pod("validate")
    assert pod["metadata"]["namespace"] == "recommend"
    assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "urm"
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "validate"
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


def test_each_class_has_an_account_and_a_secret(render_pod):
    pods = {stage: render_pod(stage)["spec"] for stage in STAGES}
    classes = {stage: f"urm-{STAGES[stage].access}" for stage in STAGES}
    assert {stage: pod["serviceAccountName"] for stage, pod in pods.items()} == classes
    assert [stage for stage, pod in pods.items() if pod["automountServiceAccountToken"]] == ["promote"]
    for stage, pod in pods.items():
        sources = pod["containers"][0]["envFrom"]
        assert sources == [{"configMapRef": {"name": "urm-settings"}}, {"secretRef": {"name": classes[stage]}}]


def test_the_table_decides_where_and_on_what_a_pod_runs(render_pod, tmp_path):
    table = tmp_path / "pods.yaml"
    table.write_text("""
        defaults: {node_selector: {pool: training}, priority_class: high}
        sft:
          image: registry.example/cuda:1
          memory: 32Gi
          gpus: 2
          shared_memory: 4Gi
          ephemeral_storage: 50Gi
          cache_claim: urm-cache
          kueue_queue: gpus
          tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoExecute, tolerationSeconds: 60}]
        """)
    pod = render_pod("sft", SETTINGS.model_copy(update={"pods_file": table}))
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    assert container["image"] == "registry.example/cuda:1"
    same = {"memory": "32Gi", "ephemeral-storage": "50Gi"}
    assert container["resources"] == {"requests": {"cpu": "8", **same}, "limits": {**same, "nvidia.com/gpu": "2"}}
    assert spec["nodeSelector"] == {"pool": "training"}
    assert spec["priorityClassName"] == "high"
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    assert spec["tolerations"] == [toleration]
    assert pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
    assert volumes == {
        "cache": {"persistentVolumeClaim": {"claimName": "urm-cache"}},
        "tmp": {"emptyDir": {"sizeLimit": "50Gi"}},
        "shared-memory": {"emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}},
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"cache": "/cache", "tmp": "/tmp", "shared-memory": "/dev/shm"}  # noqa: S108


@pytest.fixture
def on_spark(render_pod, monkeypatch):
    """A pod as `render_pod` makes it where Airflow's environment names Spark on the cluster."""
    master = "k8s://https://kubernetes.default.svc"
    monkeypatch.setenv("URM_ENGINE", "spark")
    monkeypatch.setenv("URM_SPARK_MASTER", master)
    monkeypatch.setenv("URM_ENGINE_MEMORY", "12GB")
    get_settings.cache_clear()
    return lambda stage: render_pod(
        stage, SETTINGS.model_copy(update={"engine": "spark", "spark_master": master, "namespace": "urm"})
    )


def test_the_engine_reaches_the_stages_that_run_on_it_and_no_others(on_spark):
    pods = {stage: on_spark(stage)["spec"] for stage in STAGES}
    environments = {stage: {one["name"]: one for one in pod["containers"][0]["env"]} for stage, pod in pods.items()}
    engines = {stage: values["URM_ENGINE"]["value"] for stage, values in environments.items()}
    assert engines == {stage: "spark" if stage in ("validate", "features") else "duckdb" for stage in STAGES}
    for stage in ("validate", "features"):
        values = environments[stage]
        assert values["URM_SPARK_MASTER"]["value"] == "k8s://https://kubernetes.default.svc"
        assert values["URM_ENGINE_MEMORY"]["value"] == "12GB"
        fields = {name: values[name]["valueFrom"]["fieldRef"]["fieldPath"] for name in values if "_DRIVER_" in name}
        assert fields == {"URM_SPARK_DRIVER_HOST": "status.podIP", "URM_SPARK_DRIVER_POD": "metadata.name"}
        assert (pods[stage]["serviceAccountName"], pods[stage]["automountServiceAccountToken"]) == ("urm-spark", True)
        mounts = {one["name"]: one["mountPath"] for one in pods[stage]["containers"][0]["volumeMounts"]}
        assert mounts["spark"] == values["SPARK_CONF_DIR"]["value"]
    assert not any("SPARK" in name for name in environments["ingest"])


@needs_kubectl
@pytest.mark.parametrize("stage", [stage for stage in STAGES if STAGES[stage].spark])
def test_a_driver_of_spark_keeps_the_policies_of_the_manifests(on_spark, stage):
    pod = on_spark(stage)
    name = f"Pod/{pod['metadata']['name']}"
    faults = {fault for fault in policies.find_faults([*rendering.render("production", "spark"), pod]) if name in fault}
    probes = {f"{name}: base has no {probe}" for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert faults == {*probes, f"{name}: base has no limits of cpu", f"{name} has a token of the Kubernetes API"}


def test_the_pod_is_valid_kubernetes(render_pod, on_spark):
    import kubernetes_validate

    for pod in (render_pod("ingest"), render_pod("sft"), on_spark("features")):
        kubernetes_validate.validate(pod, "1.33", strict=True)


@needs_kubectl
@pytest.mark.parametrize("stage", STAGES)
def test_the_pod_keeps_the_policies_of_the_manifests(render_pod, stage):
    pod = render_pod(stage, SETTINGS.model_copy(update={"namespace": "urm"}))
    name = f"Pod/{pod['metadata']['name']}"
    faults = {fault for fault in policies.find_faults([*rendering.render("base"), pod]) if name in fault}
    # Nothing is served, and cores are shared; who promotes asks the Kubernetes API.
    probes = {f"{name}: base has no {probe}" for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    token = {f"{name} has a token of the Kubernetes API"} if stage == "promote" else set()
    assert faults == {*probes, f"{name}: base has no limits of cpu", *token}


@pytest.fixture
def drive(home, pod_server, render, monkeypatch):
    """Runs a task as Airflow does: worker, triggerer, a worker again, until it is done; returns its context."""
    from airflow.sdk.exceptions import TaskDeferred

    from dags.common import pod_trigger
    from dags.common.pod_trigger import PodTrigger
    from dags.common.tasks import stage_task

    monkeypatch.setattr(pod_trigger, "POLL_SECONDS", 0.01)

    async def watch(trigger):
        async with asyncio.timeout(20):
            return (await anext(aiter(trigger.run()))).payload

    def go(stage="sft", settings=SETTINGS):
        task, context = render(stage_task(stage, settings))
        result = home / "runs" / "manual__2026-11-25T10-00-00-00-00" / stage / "result.json"
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps({"metrics": {}, "counts": {}, "seconds": 1, "outputs": {}}))
        step = task.execute
        while True:
            try:
                step(context)
                return context
            except TaskDeferred as deferred:
                kwargs, method, timeout = deferred.trigger.serialize()[1], deferred.method_name, deferred.timeout
            assert timeout is None  # the limits are the pod's: of its queue, and of its run
            event = asyncio.run(watch(PodTrigger(**json.loads(json.dumps(kwargs)))))
            task, context = render(stage_task(stage, settings))
            step = partial(task.resume_execution, method, {"event": event})

    return go


def test_a_pod_that_ended_well_leaves_its_summary_and_no_pod(drive, pod_server):
    pod_server.next = [pods.ended(0)]
    assert drive()["ti"].pushed["summary"]["seconds"] == 1
    assert pod_server.pods == {}


def test_an_evicted_pod_is_followed_by_another_in_the_same_try(drive, pod_server):
    pod_server.next = [pods.evicted(), pods.evicted(), pods.ended(0)]
    drive()
    first, *others = [pod["metadata"] for pod in pod_server.created]
    assert [pod["name"] for pod in others] == [f"{first['name']}-1", f"{first['name']}-2"]
    assert [pod["annotations"]["urm.pod/disruptions"] for pod in others] == ["1", "2"]
    assert pod_server.pods == {}


def test_disruptions_have_a_limit(drive, pod_server, tmp_path):
    from airflow.sdk.exceptions import AirflowException

    table = tmp_path / "pods.yaml"
    table.write_text("defaults: {disruptions: 2}")
    pod_server.next = [pods.evicted()]
    with pytest.raises(AirflowException, match="was ended from outside: EvictionByEvictionAPI"):
        drive(settings=SETTINGS.model_copy(update={"pods_file": table}))
    assert len(pod_server.created) == 3


@pytest.mark.parametrize(
    ("status", "retried", "reason"),
    [
        (pods.ended(2, message="setting x: expected one, got two."), False, "sft ended with exit code 2: setting x"),
        (pods.ended(1, message="Traceback"), True, "sft ended with exit code 1: Traceback"),
        (pods.ended(3), True, "exit code 3"),
        (pods.ended(137, "OOMKilled"), True, "expected at most 64Gi of memory, got OOMKilled; raise `memory`"),
        (pods.waiting("InvalidImageName", "couldn't parse"), False, "got InvalidImageName: couldn't parse; correct"),
    ],
)
def test_only_what_another_try_may_help_is_tried_again(status, retried, reason, drive, pod_server):
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    pod_server.next = [status]
    with pytest.raises(AirflowException, match=reason) as caught:
        drive()
    assert isinstance(caught.value, AirflowFailException) is not retried
    assert len(pod_server.created) == 1
    assert pod_server.pods == {}


def test_success_without_a_result_is_a_failure(drive, pod_server, monkeypatch):
    from airflow.sdk.exceptions import AirflowException

    monkeypatch.setenv("URM_RUNS_URI", "memory://elsewhere")
    pod_server.next = [pods.ended(0)]
    with pytest.raises(AirflowException, match=r"stage sft: expected .*/sft/result.json, got nothing"):
        drive()


@pytest.fixture
def start(home, pod_server, render):
    """Starts the task as a worker does; returns it and what it waits for."""
    from airflow.sdk.exceptions import TaskDeferred

    from dags.common.tasks import stage_task

    def go():
        task, context = render(stage_task("sft", SETTINGS))
        with pytest.raises(TaskDeferred) as deferred:
            task.execute(context)
        return task, deferred.value.trigger

    return go


def test_a_task_that_starts_again_goes_on_with_its_pod(start, pod_server):
    """Its worker was killed, or it was cleared while no triggerer ran."""
    _, first = start()
    (pod,) = pod_server.pods.values()
    pod["metadata"]["labels"]["try_number"] = "0"
    _, second = start()
    assert (first.started, second.started, len(pod_server.created)) == (True, True, 1)


def test_a_pod_that_failed_unseen_in_an_earlier_try_is_replaced(start, pod_server):
    pod_server.next = [pods.ended(1), pods.running()]
    start()
    start()
    assert len(pod_server.created) == 2
    assert [pod["status"]["phase"] for pod in pod_server.pods.values()] == ["Running"]


def test_a_pod_that_no_quota_has_room_for_is_started_later(start, pod_server):
    pod_server.refused["POST"] = [(403, "pods is forbidden: exceeded quota: gpus")]
    assert not start()[1].started


def test_a_command_that_no_quota_has_room_for_fails(pod_server, home, render):
    """Whoever waited for room could not tell after a restart whether the command has run."""
    from airflow.sdk.exceptions import AirflowFailException

    from components.flow import STAGES
    from dags.common.tasks import command_task
    from dags.recall_rollback import rollback_arguments

    given = {"doc": "A test.", "resources": STAGES["promote"].resources, "access": "promotion", "credentials": []}
    pod_server.refused["POST"] = [(403, "pods is forbidden: exceeded quota: urm")]
    task, context = render(command_task("rollback", rollback_arguments, **given, settings=SETTINGS), why="", to=None)
    with pytest.raises(AirflowFailException, match="exceeded quota: urm; correct"):
        task.execute(context)
    assert not pod_server.created


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, 'error looking up service account urm/urm-training: serviceaccount "urm-training" not found'),
        (422, "spec.containers[0].resources: Invalid value"),
    ],
)
def test_a_pod_that_the_cluster_does_not_take_fails_the_task(status, message, home, pod_server, render):
    from airflow.sdk.exceptions import AirflowFailException

    from dags.common.tasks import stage_task

    pod_server.refused["POST"] = [(status, message)]
    task, context = render(stage_task("sft", SETTINGS))
    with pytest.raises(
        AirflowFailException, match=re.escape(f"expected the cluster to take it, got {message}; correct")
    ):
        task.execute(context)


def test_a_busy_cluster_is_asked_again(start, pod_server, monkeypatch):
    from dags.common import pod

    monkeypatch.setattr(pod.UrmPodOperator._start.retry, "sleep", lambda _: None)
    pod_server.refused["POST"] = [(503, "busy"), (429, "slow down")]
    assert start()[1].started


OTHER = {"metadata": {"name": "other", "labels": {"task_id": "sft"}}, "spec": {}}


def test_ending_the_task_deletes_its_pods_and_no_others(start, pod_server):
    pod_server.add(OTHER, pods.running())
    start()[0].on_kill()
    assert list(pod_server.pods) == ["other"]


def test_a_wait_that_failed_leaves_no_pod(start, pod_server, render):
    """The triggerer cannot import the trigger."""
    from airflow.sdk.exceptions import TaskDeferralError

    from dags.common.tasks import stage_task

    start()
    pod_server.add(OTHER, pods.running())
    task, context = render(stage_task("sft", SETTINGS))
    with pytest.raises(TaskDeferralError):
        task.resume_execution("__fail__", {"error": "Trigger failure"}, context)
    assert list(pod_server.pods) == ["other"]


@pytest.mark.parametrize("executor", ["local", "kubernetes"])
def test_what_the_gate_skipped_stays_skipped_when_it_is_cleared_alone(executor):
    """The scheduler reads the DAG as it was serialized: there the gate says that it can skip."""
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.ti_deps.deps.not_previously_skipped_dep import NotPreviouslySkippedDep

    from dags.common.tasks import stage_task

    with DAG("flow", schedule=None, start_date=datetime(2026, 1, 1)) as dag:
        settings = Settings(executor=executor)
        stage_task("gate", settings) >> stage_task("release", settings)
    read = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    states = []
    release = SimpleNamespace(
        task=read.get_task("release"),
        task_id="release",
        map_index=-1,
        get_dagrun=lambda session: None,
        xcom_pull=lambda **_: {"skipped": ["release"]},  # what the gate left
        set_state=lambda state, session: states.append(state),
    )
    finished = SimpleNamespace(
        ensure_finished_tis=lambda run, session: [SimpleNamespace(task_id="gate")],
        wait_for_past_depends_before_skipping=False,
    )
    (answer,) = NotPreviouslySkippedDep()._get_dep_statuses(release, finished, session=None)
    assert (answer.passed, states) == (False, ["skipped"])
