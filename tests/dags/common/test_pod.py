"""The pod of a stage, as it would be sent to Kubernetes."""

from dataclasses import replace

import pytest

from components.flow import STAGES
from components.settings import Settings

SETTINGS = Settings(executor="kubernetes", image="registry.example/urm:1.2.3", namespace="recommend")


@pytest.fixture
def render_pod(home, render, monkeypatch):
    monkeypatch.setenv("URM_RUNS_URI", "s3://bucket/runs")
    monkeypatch.setenv("URM_AIRFLOW_URL", "http://airflow.example")
    from kubernetes.client import ApiClient

    from dags.common.tasks import stage_task

    def make(stage, **params):
        operator, context = render(stage_task(stage, SETTINGS), **params)
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
    assert {"arguments", "env_vars"} <= set(task.template_fields)
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
    assert [list(source) for source in container["envFrom"]] == [["configMapRef"], ["secretRef"]]


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


def test_only_who_promotes_has_a_token_of_the_kubernetes_api(render_pod):
    pods = {stage: render_pod(stage)["spec"] for stage in STAGES}
    accounts = {stage: (pod["serviceAccountName"], pod["automountServiceAccountToken"]) for stage, pod in pods.items()}
    assert accounts == dict.fromkeys(STAGES, ("urm-stage", False)) | {"promote": ("urm-promoter", True)}
    secrets = [
        source["secretRef"]["name"] for source in pods["promote"]["containers"][0]["envFrom"] if "secretRef" in source
    ]
    assert secrets == ["urm-credentials", "urm-promotion-token"]


def test_the_pod_is_valid_kubernetes(render_pod):
    import kubernetes_validate

    for stage in ("ingest", "sft"):
        kubernetes_validate.validate(render_pod(stage), "1.33", strict=True)


def test_long_stages_wait_without_a_worker():
    from dags.common.tasks import stage_task

    assert stage_task("sft", SETTINGS).deferrable
    assert not stage_task("gate", SETTINGS).deferrable


def _pod_with_exit_code(code):
    from kubernetes.client import models as k8s

    state = k8s.V1ContainerState(terminated=k8s.V1ContainerStateTerminated(exit_code=code))
    status = k8s.V1ContainerStatus(name="base", state=state, image="", image_id="", ready=False, restart_count=0)
    return k8s.V1Pod(status=k8s.V1PodStatus(container_statuses=[status]))


def _command_pod(task_id):
    from dags.common.pod import UrmPodOperator
    from dags.common.tasks import pod_arguments

    pod = pod_arguments(task_id, replace(STAGES[task_id].resources, hours=1 / 12), SETTINGS)
    return UrmPodOperator(task_id=task_id, arguments=["show"], **pod)


@pytest.mark.parametrize("kind", ["stage", "command"])
@pytest.mark.parametrize(("code", "retried"), [(2, False), (1, True), (3, True), (137, True)])
def test_exit_code_of_the_pod_decides_about_a_retry(kind, code, retried, home, run, monkeypatch):
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    from dags.common.tasks import stage_task

    operator = stage_task("gate", SETTINGS) if kind == "stage" else _command_pod("gate")

    def fail(self, context):
        self.remote_pod = _pod_with_exit_code(code)
        raise AirflowException("Pod returned a failure.")

    monkeypatch.setattr(KubernetesPodOperator, "execute", fail)
    command = "show" if kind == "command" else "gate"
    with pytest.raises(AirflowException, match=f"urm {command} ended with exit code {code}") as caught:
        run(operator)
    assert isinstance(caught.value, AirflowFailException) is not retried


def test_success_without_a_result_is_a_failure(home, make_context, monkeypatch):
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from airflow.sdk.exceptions import AirflowException

    from dags.common.tasks import stage_task

    monkeypatch.setattr(KubernetesPodOperator, "trigger_reentry", lambda *_: None)
    with pytest.raises(AirflowException, match=r"stage sft: expected .*/sft/result.json, got nothing"):
        stage_task("sft", SETTINGS).trigger_reentry(make_context("sft"), {"status": "success"})
