"""Runs the back-fill on a cluster, as an Indexed Job whose pods share the users."""

import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import yaml
from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
from airflow.sdk import BaseOperator, Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.client import V1DeleteOptions, V1Job, V1Preconditions
from kubernetes.client.exceptions import ApiException

from components.settings import Settings
from dags.common.backfill import backfill_arguments, describe
from dags.common.backfill_trigger import BackfillTrigger
from dags.common.outcome import raise_for_exit_code, write_notes
from dags.common.params import link_variables
from dags.common.pod import ask_again
from dags.common.pod_table import PodNeeds

JOB_TEMPLATE = Path(__file__).parents[2] / "k8s" / "jobs" / "backfill.yaml"
RUN = "urm.backfill/run"  # annotation: the DAG run that a Job belongs to
ANY_ADDRESS, METRICS_PORT = "0.0.0.0", 9101  # noqa: S104  # of a pod, which Prometheus reaches
DELETION_SECONDS = 120  # longer than a pod's grace


def backfill_job(needs: PodNeeds, settings: Settings, context: Context, jinja_env: Any = None) -> dict[str, Any]:
    """The Job of a DAG run: the template, with what the table of pods and the params say."""
    params = context["params"]
    shards, pods = params["shards"], min(params["pods"], params["shards"])
    *command, _ = backfill_arguments(context)
    job: dict[str, Any] = yaml.safe_load(JOB_TEMPLATE.read_text())
    job["metadata"] |= {"namespace": settings.namespace, "annotations": {RUN: _name_run(context)}}
    if needs.kueue_queue:
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = needs.kueue_queue
    seconds = round(needs.hours * 3600)
    job["spec"] |= {"completions": shards, "parallelism": pods, "activeDeadlineSeconds": seconds}
    pod = job["spec"]["template"]["spec"]
    pod["nodeSelector"] = needs.node_selector
    pod["tolerations"] = [one.model_dump(by_alias=True, exclude_none=True) for one in needs.tolerations]
    if needs.priority_class:
        pod["priorityClassName"] = needs.priority_class
    pod["volumes"][0]["emptyDir"] = {"sizeLimit": needs.ephemeral_storage}
    container = pod["containers"][0]
    container["image"] = needs.image
    shard = ["--shard=$(JOB_COMPLETION_INDEX)", f"--shards={shards}", f"--rate={params['rate'] / pods:g}"]
    container["args"] = [*command, *shard, "--host", ANY_ADDRESS, "--metrics-port", str(METRICS_PORT)]
    container["env"] += [{"name": name, "value": value} for name, value in link_variables(context).items()]
    size = {"cpu": needs.cpu, "memory": needs.memory, "ephemeral-storage": needs.ephemeral_storage}
    if needs.gpus:
        size["nvidia.com/gpu"] = str(needs.gpus)
        container["env"].append({"name": "URM_DEVICE", "value": "cuda"})
    container["resources"] = {"requests": size, "limits": size}
    return job


class BackfillJobOperator(BaseOperator):
    """The back-fill as the Job `recall-backfill`, one at a time per namespace; it is waited for in the triggerer.

    A task that starts again because its worker was killed goes on with the Job of its DAG run. A Job that failed, or
    that another run left, is replaced; the shards go on where they were, which Redis knows. One that is complete is
    deleted once the run's note has its figures, so that a task cleared afterwards starts over.

    Args:
        needs: What its pods need.
        settings: Namespace.
        kubernetes_conn_id: Airflow's connection to the cluster.
    """

    template_fields = ("job",)
    template_fields_renderers: ClassVar[dict[str, str]] = {"job": "yaml"}
    ui_color = "#e8f0fe"

    def __init__(
        self, *, needs: PodNeeds, settings: Settings, kubernetes_conn_id: str = "kubernetes_default", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.job: Any = partial(backfill_job, needs, settings)  # a dictionary once rendered
        self.kubernetes_conn_id = kubernetes_conn_id
        self._uid = ""

    def execute(self, context: Context) -> None:
        """Find the Job of this run, or create it, and wait for it in the triggerer."""
        found = self._read()
        if found is not None and not self._is_ours(found, context):
            of_run = (found.metadata.annotations or {}).get(RUN, "none: made by hand")
            self.log.info("Replacing Job %s of run %s.", found.metadata.name, of_run)
            self._delete(found.metadata.uid)
            found = None
        job = found or self._create()
        self._uid = job.metadata.uid
        self.log.info("Waiting for Job %s (uid %s) in the triggerer.", job.metadata.name, self._uid)
        trigger = BackfillTrigger(
            namespace=job.metadata.namespace,
            name=job.metadata.name,
            uid=self._uid,
            conn_id=self.kubernetes_conn_id,
            in_cluster=self._hook().is_in_cluster or None,
        )
        self.defer(trigger=trigger, method_name="finish")

    def finish(self, context: Context, event: dict[str, Any]) -> None:
        """Act on how the Job ended; the run's note says what came of the users.

        Raises:
            AirflowFailException: The input is wrong, or its pods cannot start; not tried again.
            AirflowException: Any other failure; the next try goes on where this one was.
        """
        if event["figures"]:
            write_notes(f"{describe(event['figures'])}.", context)
        if event.get("hopeless"):
            self._delete(event["uid"], wait=False)  # else a task that is cleared would go on with what cannot start
            raise AirflowFailException(event["reason"])
        if event["exit_code"]:
            raise_for_exit_code("recall backfill", event["exit_code"], event["reason"])
        if not event["complete"]:
            raise AirflowException(event["reason"])
        self._delete(event["uid"], wait=False)  # else a task cleared later would take it for its own

    def on_kill(self) -> None:
        """Delete the Job: somebody ended this task before it was deferred."""
        if self._uid:
            self._delete(self._uid, wait=False)

    def _is_ours(self, job: V1Job, context: Context) -> bool:
        failed = any(one.type in ("Failed", "FailureTarget") for one in job.status.conditions or [])
        ours = (job.metadata.annotations or {}).get(RUN) == _name_run(context)
        return ours and not failed and job.metadata.deletion_timestamp is None

    def _hook(self) -> KubernetesHook:
        return KubernetesHook(conn_id=self.kubernetes_conn_id)

    @property
    def _place(self) -> tuple[str, str]:
        return self.job["metadata"]["name"], self.job["metadata"]["namespace"]

    @ask_again
    def _read(self) -> V1Job | None:
        try:
            return self._hook().batch_v1_client.read_namespaced_job(*self._place)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    @ask_again
    def _create(self) -> V1Job:
        try:
            return self._hook().batch_v1_client.create_namespaced_job(self._place[1], self.job)
        except ApiException as error:
            if error.status == 409 and (made := self._read()) is not None:  # the first answer was lost
                return made
            raise

    @ask_again
    def _delete(self, uid: str, wait: bool = True) -> None:
        """Delete this very Job with its pods; with `wait`, return when they are gone, so that no shard runs twice."""
        options = V1DeleteOptions(preconditions=V1Preconditions(uid=uid), propagation_policy="Foreground")
        try:
            self._hook().batch_v1_client.delete_namespaced_job(*self._place, body=options)
        except ApiException as error:
            if error.status not in (404, 409):  # gone, or another one by its name
                raise
        deadline = time.monotonic() + DELETION_SECONDS
        while wait and (left := self._read()) is not None and left.metadata.uid == uid:
            if time.monotonic() > deadline:
                raise AirflowException(
                    f"Job {self._place[0]}: expected its pods to end within {DELETION_SECONDS} s, got some that go on; "
                    "see why with `kubectl describe`."
                )
            time.sleep(1)


def _name_run(context: Context) -> str:
    return f"{context['dag'].dag_id}/{context['run_id']}"
