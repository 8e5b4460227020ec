"""Airflow's operator of a TrainJob."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
from airflow.sdk import BaseOperator, Context, conf
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubeflow_trainer_api.models.io_k8s_apimachinery_pkg_apis_meta_v1_object_meta import (
    IoK8sApimachineryPkgApisMetaV1ObjectMeta as ObjectMeta,
)
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob as TrainJob
from kubernetes.client import ApiException, V1Pod
from urllib3.exceptions import HTTPError

from dags.trainjob.cluster import TASK_LABEL, Cluster, ask_again
from dags.trainjob.job import (
    GROUP,
    VERSION,
    Progress,
    count_nodes,
    describe_failure,
    describe_waiting,
    exit_code,
    find_condition,
    find_disrupted,
    find_failed,
    find_stuck,
    is_running,
    is_suspended,
    is_transient,
    newest,
    rank,
    select_nodes,
)
from dags.trainjob.logs import seconds_to_read, split_new
from dags.trainjob.trigger import TrainJobTrigger

STATE_KEY = "train_job"
# JobSet adds "-node-0-0-" and five letters for the name of a pod, which has at most 63 characters.
NAME_LENGTH = 40
LAST_LINES = 20


class TrainJobOperator(BaseOperator):
    """Runs a TrainJob of Kubeflow Trainer v2 and waits for it, deferred, through suspension, admission and preemption.

    **Waiting.** A TrainJob that Kueue has not admitted is suspended; one that it preempts is suspended again. Neither
    spends a retry. Each wait has its limit, `queue_timeout`; the time that the TrainJob may run has another,
    `active_deadline_seconds`, which Trainer keeps and starts anew when the TrainJob is resumed.

    **Log.** While the task is deferred, it comes back every `logging_interval` seconds to write what the first node has
    logged since, each line once, and only if there is something new. It comes back at once when the TrainJob starts, is
    suspended, loses a pod or ends. What a pod writes after that until it is gone, within its grace period, can be lost;
    a kubelet serves the newest file of a log only, so that more than its `containerLogMaxSize` in an interval loses the
    oldest lines.

    **Disruptions.** A TrainJob that fails after one of its pods was evicted, preempted or lost with its node, or that
    somebody deletes, is submitted again within the same try, at most `disruptions` times.

    **Resuming.** The uid of a TrainJob is kept in the task's state store: after a killed worker the next try goes on
    with it and with its log. A TrainJob of the same name with another uid is left alone. A worker killed between
    submitting and keeping it finds the TrainJob by a label.

    **Ending.** Marking the task failed or success, and clearing it, deletes the TrainJob by its uid, from the triggerer
    or from the worker. Between the two, in the seconds when the task waits for a worker or its trigger for the
    triggerer, Airflow tells neither; `active_deadline_seconds` is the net below that.

    **The triggerer** imports `dags.trainjob.trigger` by its name, and Airflow adds no DAG bundle to the triggerer's
    path: the folder that holds `dags` must be on the triggerer's `PYTHONPATH`.

    Rights in the namespace: `trainjobs` (trainer.kubeflow.org) create, get, list, patch, delete; `pods` list;
    `pods/log` get; `events` list.

    Args:
        train_job: The TrainJob (templated): a model of kubeflow-trainer-api, a dictionary of one, or a function of the
            context that returns such a dictionary. Its name gets a suffix.
        namespace: Namespace; by default the TrainJob's, then the connection's, then `default`.
        queue_timeout: Longest wait for admission or nodes, in seconds; none: any.
        startup_timeout: Longest time between a pod's getting a node and its start, in seconds; none: any.
        active_deadline_seconds: Longest time that it may run; none: what the TrainJob says.
        logging_interval: Seconds between two readings of the log while it runs; none: the log is read when the
            TrainJob starts, waits or ends.
        poll_interval: Seconds between two looks at the cluster.
        minimum_wait: Seconds that the task stays deferred at least. Airflow's scheduler fails a task that runs again
            before it has heard that the last process of the task has ended.
        disruptions: Most times that it is submitted again after a disruption.
        fail_on_exit_code: Exit codes of the first node after which no retry follows.
        on_finish_action: Which TrainJobs that have ended are deleted: those that succeeded (`delete_succeeded`), all
            (`delete`) or none (`keep`).
        on_kill_action: Whether a TrainJob whose task is ended by a person is deleted: `delete` or `keep`.
        propagation_policy: How its pods are deleted with it.
        replicated_job: Replicated job of the runtime whose pods are the nodes.
        base_container_name: Their container.
        random_name_suffix: Whether the name gets a suffix; without it, a second try may find the name taken.
        deferrable: Whether the task waits in the triggerer, or in a worker.
        kubernetes_conn_id, in_cluster, config_file, cluster_context: As in `KubernetesPodOperator`.
    """

    template_fields: Sequence[str] = (
        *("train_job", "namespace", "kubernetes_conn_id", "config_file", "cluster_context"),
        *("queue_timeout", "active_deadline_seconds"),
    )
    template_fields_renderers = {"train_job": "json"}  # noqa: RUF012  # BaseOperator's own form
    ui_color = "#e6f4ea"

    def __init__(
        self,
        *,
        train_job: TrainJob | dict[str, Any] | Callable[..., Any],
        namespace: str | None = None,
        queue_timeout: float | None = None,
        startup_timeout: float | None = 600,
        active_deadline_seconds: int | None = None,
        logging_interval: float | None = None,
        poll_interval: float = 10,
        minimum_wait: float = 30,
        disruptions: int = 0,
        fail_on_exit_code: int | Collection[int] = (),
        on_finish_action: Literal["delete_succeeded", "delete", "keep"] = "delete_succeeded",
        on_kill_action: Literal["delete", "keep"] = "delete",
        propagation_policy: Literal["Foreground", "Background", "Orphan"] = "Foreground",
        replicated_job: str = "node",
        base_container_name: str = "node",
        random_name_suffix: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        kubernetes_conn_id: str | None = KubernetesHook.default_conn_name,
        in_cluster: bool | None = None,
        config_file: str | None = None,
        cluster_context: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.train_job: Any = train_job.to_dict() if isinstance(train_job, TrainJob) else train_job
        self.namespace = namespace
        self.queue_timeout, self.startup_timeout = queue_timeout, startup_timeout
        self.active_deadline_seconds = active_deadline_seconds
        self.logging_interval, self.poll_interval, self.minimum_wait = logging_interval, poll_interval, minimum_wait
        self.disruptions = disruptions
        codes = {fail_on_exit_code} if isinstance(fail_on_exit_code, int) else fail_on_exit_code
        self.fail_on_exit_code = frozenset(codes)
        self.on_finish_action, self.on_kill_action = on_finish_action, on_kill_action
        self.propagation_policy = propagation_policy
        self.replicated_job, self.base_container_name = replicated_job, base_container_name
        self.random_name_suffix = random_name_suffix
        self.deferrable = deferrable
        self.kubernetes_conn_id, self.in_cluster = kubernetes_conn_id, in_cluster
        self.config_file, self.cluster_context = config_file, cluster_context
        self._progress: Progress | None = None

    @cached_property
    def hook(self) -> KubernetesHook:
        """Connection to the cluster."""
        return KubernetesHook(
            conn_id=self.kubernetes_conn_id,
            in_cluster=self.in_cluster,
            config_file=self.config_file,
            cluster_context=self.cluster_context,
        )

    @cached_property
    def cluster(self) -> Cluster:
        """What is asked of it."""
        return Cluster(self.hook)

    def execute(self, context: Context) -> None:
        """Submit the TrainJob, or go on with the one that an earlier process of this task submitted.

        Raises:
            TaskDeferred: It has not ended.
            AirflowFailException: The first node ended with a code of `fail_on_exit_code`.
            AirflowException: It failed otherwise, or waited for too long.
        """
        self._progress = self._find(context) or self._submit(context)
        context["ti"].xcom_push(key="train_job", value=self._identity())
        self._wait(context)

    def trigger_reentry(self, context: Context, event: dict[str, Any], progress: dict[str, Any]) -> None:
        """Go on after the wait; raises as `execute` does."""
        self._progress = Progress.from_json(progress)
        self._act(context, event)
        self._wait(context)

    def on_kill(self) -> None:
        """Delete the TrainJob, if a person ends the task while a worker has it."""
        if self._progress is not None and self.on_kill_action == "delete":
            self.cluster.delete(self._progress, self.propagation_policy)

    def _wait(self, context: Context) -> None:
        """Wait for the next event, again and again if not deferred, until the TrainJob has ended well."""
        while self._progress is not None:
            trigger = self._make_trigger(self._progress)
            if self.deferrable:
                kwargs = {"progress": self._progress.to_json()}
                self.defer(trigger=trigger, method_name="trigger_reentry", kwargs=kwargs)

            async def first(trigger: TrainJobTrigger = trigger) -> dict[str, Any]:
                events = [event.payload async for event in trigger.run()]
                found: dict[str, Any] = events[0]
                return found

            self._act(context, asyncio.run(first()))

    def _make_trigger(self, progress: Progress) -> TrainJobTrigger:
        return TrainJobTrigger(
            progress=progress.to_json(),
            queue_timeout=None if self.queue_timeout is None else float(self.queue_timeout),
            startup_timeout=self.startup_timeout,
            logging_interval=self.logging_interval,
            poll_interval=self.poll_interval,
            minimum_wait=self.minimum_wait if self.deferrable else 0,
            replicated_job=self.replicated_job,
            container=self.base_container_name,
            delete_on_kill=self.on_kill_action == "delete",
            propagation_policy=self.propagation_policy,
            kubernetes_conn_id=self.kubernetes_conn_id,
            connection_extras=self.hook.conn_extras,
            # The asynchronous hook does not find out by itself that it is within a cluster.
            in_cluster=self.hook.is_in_cluster,
            config_file=self.config_file,
            cluster_context=self.cluster_context,
        )

    def _act(self, context: Context, event: dict[str, Any]) -> None:
        """Act on an event; where the API server does not answer, the trigger will fire again."""
        try:
            self._step(context, event)
        except (ApiException, HTTPError) as error:
            if not is_transient(error) or self._progress is None:
                raise
            self.log.warning("TrainJob %s: the API server did not answer: %s", self._progress.name, error)

    def _step(self, context: Context, event: dict[str, Any]) -> None:
        """Read what is new of the TrainJob and act on it; what the event says decides of time-outs only."""
        progress = self._require_progress()
        if event["status"] == "denied":
            raise AirflowException(
                f"TrainJob {progress.name}: the triggerer may not watch it ({event['message']}); give its account the "
                "rights that TrainJobOperator names."
            )
        job = self._get(progress)
        if job is None:
            self._submit_again(context, f"TrainJob {progress.name} is gone")
            return
        nodes = select_nodes(job, self.cluster.list_pods(job), self.replicated_job)
        self._write_log(nodes)
        ended = find_condition(job, "Complete", "Failed")
        if ended is None:
            self._follow(context, job, nodes, event["status"])
            self._store(context)
        elif ended.type == "Complete":
            self.log.info("TrainJob %s is complete", progress.name)
            self._close(context, delete=self.on_finish_action != "keep")
        else:
            self._fail(context, ended, nodes)

    def _follow(self, context: Context, job: TrainJob, nodes: list[V1Pod], reason: str) -> None:
        """Note how a TrainJob that has not ended fares.

        Raises:
            AirflowException: It waited, or a pod of it took to start, for too long; it is deleted.
        """
        progress, suspended = self._require_progress(), is_suspended(job)
        # A queue that suspends it ends its pods, too; that is no disruption.
        ended = [] if suspended else find_disrupted(nodes, self.base_container_name)
        disrupted = [pod.metadata.name for pod in ended]
        if disrupted and not progress.disrupted:
            self.log.warning("TrainJob %s: evicted, preempted or lost: %s", progress.name, ", ".join(disrupted))
        if is_running(job, nodes):
            if progress.waiting_since is not None:
                places = ", ".join(f"{pod.metadata.name} on {pod.spec.node_name}" for pod in newest(nodes))
                self.log.info("TrainJob %s runs: %s", progress.name, places)
            self._progress = replace(progress, waiting_since=None, suspended=False, disrupted=bool(disrupted))
            return
        text = describe_waiting(job, nodes)
        if progress.waiting_since is None or progress.suspended != suspended:
            self.log.info("TrainJob %s: %s", progress.name, text)
        self._progress = replace(
            progress,
            waiting_since=progress.waiting_since or time.time(),
            suspended=suspended,
            disrupted=progress.disrupted or bool(disrupted),
        )
        if reason == "queue_timeout":
            self._give_up(context, f"it did not run within {self.queue_timeout} seconds", text)
        limit = self.startup_timeout
        if reason == "startup_timeout" and limit is not None and find_stuck(nodes, limit, datetime.now(UTC)):
            self._give_up(context, f"a pod did not start within {limit} seconds", text)

    def _give_up(self, context: Context, what: str, waiting: str) -> None:
        progress = self._require_progress()
        warning = self.cluster.last_warning(progress)
        self._close(context, delete=True)
        said = f" Its last warning: {warning}." if warning else ""
        raise AirflowException(f"TrainJob {progress.name}: {what}: {waiting}.{said} It is deleted.")

    def _fail(self, context: Context, ended: Any, nodes: list[V1Pod]) -> None:
        """Submit it again after a disruption, or say why it failed."""
        progress, container = self._require_progress(), self.base_container_name
        ended_by_others = progress.disrupted or find_disrupted(nodes, container)
        if ended_by_others and ended.reason != "DeadlineExceeded":
            self._submit_again(context, f"TrainJob {progress.name} failed after a disruption of its pods")
            return
        text = f"TrainJob {progress.name} failed ({ended.reason}: {ended.message})"
        failed = find_failed(nodes, container)
        if failed is not None:
            lines = self.cluster.read_log(
                failed, container, tail_lines=LAST_LINES
            )  # the first node's are all written already
            text += "".join([f": {self.describe(failed)}", *(f"\n  {line}" for line in lines)])
        codes = {exit_code(pod, container) for pod in newest(nodes) if rank(pod) == 0}
        self._close(context, delete=self.on_finish_action == "delete")
        raise AirflowFailException(text) if codes & self.fail_on_exit_code else AirflowException(text)

    def describe(self, failed: V1Pod) -> str:
        """How a pod failed, in one clause; a subclass may say what to do about it."""
        return describe_failure(failed, self.base_container_name)

    def _submit_again(self, context: Context, why: str) -> None:
        """Replace a TrainJob that others ended.

        Raises:
            AirflowException: That has happened too often.
        """
        ended = self._require_progress()
        count = ended.disruptions + 1
        self._close(context, delete=self.on_finish_action != "keep")
        if count > self.disruptions:
            raise AirflowException(f"{why}; `disruptions` allows {self.disruptions} in a try, and this is one more.")
        self.log.warning("%s; a new one follows (%d of at most %d in this try)", why, count, self.disruptions)
        self._progress = replace(self._submit(context), disruptions=count)
        self._store(context)

    def build(self, context: Context) -> TrainJob:
        """The TrainJob as it is submitted."""
        given = self.train_job
        job = given if isinstance(given, TrainJob) else TrainJob.from_dict(given)
        if job is None or job.spec is None:
            raise AirflowFailException(f"task {self.task_id}: expected a TrainJob with a spec, got {given!r}.")
        job = job.model_copy(deep=True)
        job.api_version, job.kind = f"{GROUP}/{VERSION}", "TrainJob"
        meta = job.metadata = job.metadata or ObjectMeta()
        name = (meta.name or self.task_id.lower().replace("_", "-").replace(".", "-"))[:NAME_LENGTH].rstrip("-")
        meta.name = f"{name}-{secrets.token_hex(4)}" if self.random_name_suffix else name
        meta.namespace = self.namespace or meta.namespace or self.hook.get_namespace() or "default"
        ti = context["ti"]
        meta.labels = {**(meta.labels or {}), TASK_LABEL: _digest(context)}
        meta.annotations = {
            **(meta.annotations or {}),
            "airflow.apache.org/dag_id": ti.dag_id,
            "airflow.apache.org/task_id": ti.task_id,
            "airflow.apache.org/run_id": ti.run_id,
            "airflow.apache.org/map_index": str(ti.map_index),
        }
        if self.active_deadline_seconds is not None:
            job.spec.active_deadline_seconds = int(self.active_deadline_seconds)
        return job

    def _submit(self, context: Context) -> Progress:
        job = self.build(context)
        meta = self.cluster.create(job, own_name=self.random_name_suffix)["metadata"]
        uid, suspended = meta["uid"], is_suspended(job)
        self._progress = Progress(meta["name"], meta["namespace"], uid, waiting_since=time.time(), suspended=suspended)
        self._store(context)
        queued = "suspended, for a queue to admit it" if suspended else f"{count_nodes(job)} nodes"
        self.log.info("TrainJob %s (uid %s) is submitted: %s", meta["name"], uid, queued)
        return self._progress

    @ask_again
    def _find(self, context: Context) -> Progress | None:
        """What an earlier process of this task submitted and has not seen the end of."""
        store = context.get("task_state_store")
        kept: Any = store.get(STATE_KEY) if store is not None else None
        progress = Progress.from_json(kept) if kept else None
        if progress:
            job = self._get(progress)
        else:
            job = self.cluster.find_unchecked(self.build(context).metadata.namespace, _digest(context))
        if job is None:
            if progress:
                self.log.warning("TrainJob %s (uid %s) is gone; a new one follows", progress.name, progress.uid)
            return None
        meta = job.metadata
        progress = progress or Progress(meta.name, meta.namespace, meta.uid, waiting_since=time.time())
        self.log.info("Going on with TrainJob %s (uid %s)", meta.name, meta.uid)
        if meta.deletion_timestamp:
            # Two must not work on one thing, so its end is waited for; it is none that counts as a disruption.
            self.log.info("TrainJob %s is being deleted; a new one follows when it is gone", meta.name)
            progress = replace(progress, disruptions=-1)
        self._progress = progress
        self._store(context)
        return progress

    def _get(self, progress: Progress) -> TrainJob | None:
        """The TrainJob; none if it is gone, or another one has its name."""
        job = self.cluster.get(progress.name, progress.namespace)
        if job is None or job.metadata.uid == progress.uid:
            return job
        self.log.warning(
            "TrainJob %s has uid %s, not %s: it is another one", progress.name, job.metadata.uid, progress.uid
        )
        return None

    def _write_log(self, nodes: list[V1Pod]) -> None:
        """Write what the first node has logged since the last time; of a pod that was replaced, first its end."""
        progress, pods = self._require_progress(), [pod for pod in nodes if rank(pod) == 0]
        known = [at for at, pod in enumerate(pods) if pod.metadata.uid == progress.log.pod]
        position, now = progress.log, datetime.now(UTC)
        for pod in pods[known[0] :] if known else pods:
            if pod.status.phase == "Pending":
                continue
            since = seconds_to_read(position, pod.metadata.uid, now)
            options: dict[str, Any] = {} if since is None else {"since_seconds": since}
            lines = self.cluster.read_log(pod, self.base_container_name, timestamps=True, **options)
            new, position = split_new(lines, position, pod.metadata.uid)
            for line in new:
                self.log.info("[%s] %s", pod.metadata.name, line)
        self._progress = replace(progress, log=position)

    def _close(self, context: Context, *, delete: bool) -> None:
        """Be done with a TrainJob that has ended: nothing takes it up again."""
        progress = self._require_progress()
        if delete:
            self.cluster.delete(progress, self.propagation_policy)
        else:
            self.cluster.mark_checked(progress)
        store = context.get("task_state_store")
        if store is not None:
            store.delete(STATE_KEY)
        self._progress = None

    def _store(self, context: Context) -> None:
        store = context.get("task_state_store")
        if store is not None:
            store.set(STATE_KEY, self._require_progress().to_json())

    def _identity(self) -> dict[str, str]:
        progress = self._require_progress()
        return {"name": progress.name, "namespace": progress.namespace, "uid": progress.uid}

    def _require_progress(self) -> Progress:
        if self._progress is None:
            raise AirflowException(f"task {self.task_id} has no TrainJob.")
        return self._progress


def _digest(context: Context) -> str:
    """Name of the task instance, whatever its try, as the value of a label."""
    ti = context["ti"]
    return hashlib.sha256(repr((ti.dag_id, ti.task_id, ti.run_id, ti.map_index)).encode()).hexdigest()[:40]
