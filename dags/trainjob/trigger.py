"""Waits for a TrainJob in the triggerer, until its task has something to do."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from aiohttp import ClientError
from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook
from airflow.triggers.base import BaseTrigger, TriggerEvent
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob as TrainJob
from kubernetes_asyncio.client import (
    ApiException,
    CoreV1Api,
    CustomObjectsApi,
    V1DeleteOptions,
    V1Pod,
    V1Preconditions,
)

from dags.trainjob.job import (
    GROUP,
    JOBSET_LABEL,
    PLURAL,
    VERSION,
    Progress,
    find_condition,
    find_disrupted,
    find_stuck,
    is_running,
    is_suspended,
    newest,
    rank,
    select_nodes,
)
from dags.trainjob.logs import seconds_to_read, split_lines, split_new

DENIED = (401, 403)


class TrainJobTrigger(BaseTrigger):
    """Fires when the task of a TrainJob has something to log, to decide or to end.

    The event names the reason (`status`) only: the task reads the cluster itself, so that an event that is late or
    comes twice does no harm. An API server that does not answer is asked again; one that denies access ends the wait.

    Reasons: `finished`; `lost`, the TrainJob is gone or another one has its name; `state`, it began to run or to wait;
    `disrupted`, a pod is being evicted or preempted; `log`, there are new lines; `queue_timeout`; `startup_timeout`;
    `denied`, with a `message`.

    Args:
        progress: `Progress` of the TrainJob, as JSON.
        queue_timeout: Longest wait for admission or nodes, in seconds; none: any.
        startup_timeout: Longest time between a pod's getting a node and its start, in seconds; none: any.
        logging_interval: Seconds between two readings of the log; none: it is read once it has ended.
        poll_interval: Seconds between two looks at the cluster.
        minimum_wait: Seconds before which it does not fire.
        replicated_job: Replicated job of the runtime whose pods are the nodes.
        container: Their container.
        delete_on_kill: Whether the TrainJob is deleted when a person ends the deferred task.
        propagation_policy: Of that deletion.
        connection_extras: What the connection says beside its address, so that the triggerer need not ask for it.
        kubernetes_conn_id, in_cluster, config_file, cluster_context: As in `KubernetesPodOperator`.
    """

    def __init__(
        self,
        *,
        progress: dict[str, Any],
        queue_timeout: float | None,
        startup_timeout: float | None,
        logging_interval: float | None,
        poll_interval: float,
        minimum_wait: float,
        replicated_job: str,
        container: str,
        delete_on_kill: bool,
        propagation_policy: str,
        kubernetes_conn_id: str | None = None,
        connection_extras: dict[str, Any] | None = None,
        in_cluster: bool | None = None,
        config_file: str | None = None,
        cluster_context: str | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.progress = Progress.from_json(progress)
        self.queue_timeout, self.startup_timeout = queue_timeout, startup_timeout
        self.logging_interval, self.poll_interval, self.minimum_wait = logging_interval, poll_interval, minimum_wait
        self.replicated_job, self.container = replicated_job, container
        self.delete_on_kill, self.propagation_policy = delete_on_kill, propagation_policy
        self.kubernetes_conn_id, self.connection_extras = kubernetes_conn_id, connection_extras
        self.in_cluster = in_cluster
        self.config_file, self.cluster_context = config_file, cluster_context

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Class path and arguments."""
        names = (
            *("queue_timeout", "startup_timeout", "logging_interval", "poll_interval", "replicated_job", "container"),
            *("delete_on_kill", "propagation_policy", "kubernetes_conn_id", "in_cluster", "config_file"),
            *("cluster_context", "connection_extras", "minimum_wait"),
        )
        arguments = {name: getattr(self, name) for name in names}
        return "dags.trainjob.trigger.TrainJobTrigger", {**arguments, "progress": self.progress.to_json()}

    @cached_property
    def hook(self) -> AsyncKubernetesHook:
        """Connection to the cluster; unlike the synchronous hook, it takes no file, but what one holds."""
        content = yaml.safe_load(Path(self.config_file).read_text()) if self.config_file else None
        return AsyncKubernetesHook(
            conn_id=self.kubernetes_conn_id,
            connection_extras=self.connection_extras,
            in_cluster=self.in_cluster,
            config_dict=content,
            cluster_context=self.cluster_context,
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look at the cluster until there is a reason to fire."""
        started = time.monotonic()
        while True:
            try:
                read_log = self.logging_interval is not None and time.monotonic() - started >= self.logging_interval
                reason = await self._look(read_log)
                if reason:
                    await asyncio.sleep(max(0.0, started + self.minimum_wait - time.monotonic()))
                    yield _event(reason)
                    return
            except ApiException as error:
                if error.status in DENIED:
                    yield _event("denied", message=f"{error.status} {error.reason}: {error.body!s}")
                    return
                self.log.warning(
                    "TrainJob %s: the API server answered %s; asked again", self.progress.name, error.status
                )
            except (OSError, ClientError) as error:  # an API server that is away is no failure of the TrainJob
                self.log.warning("TrainJob %s: %s; asked again", self.progress.name, error)
            await asyncio.sleep(self.poll_interval)

    async def on_kill(self) -> None:
        """Delete this TrainJob, and none that has taken its name, when a person ends the deferred task."""
        if not self.delete_on_kill:
            return
        async with self.hook.get_conn() as connection:
            try:
                await CustomObjectsApi(connection).delete_namespaced_custom_object(
                    *(GROUP, VERSION, self.progress.namespace, PLURAL, self.progress.name),
                    body=V1DeleteOptions(
                        preconditions=V1Preconditions(uid=self.progress.uid), propagation_policy=self.propagation_policy
                    ),
                )
                self.log.info("TrainJob %s is deleted", self.progress.name)
            except ApiException as error:
                if error.status not in (404, 409):  # gone, or another one
                    raise

    async def _look(self, read_log: bool) -> str | None:
        progress = self.progress
        async with self.hook.get_conn() as connection:
            core = CoreV1Api(connection)
            try:
                found = await CustomObjectsApi(connection).get_namespaced_custom_object(
                    GROUP, VERSION, progress.namespace, PLURAL, progress.name
                )
            except ApiException as error:
                if error.status == 404:
                    return "lost"
                raise
            job = TrainJob.from_dict(found)
            if job.metadata.uid != progress.uid:
                return "lost"
            if find_condition(job, "Complete", "Failed"):
                return "finished"
            selector = f"{JOBSET_LABEL}={progress.name}"
            pods = (await core.list_namespaced_pod(progress.namespace, label_selector=selector)).items
            nodes = select_nodes(job, pods, self.replicated_job)
            return self._judge(job, nodes) or ("log" if read_log and await self._has_new_lines(core, nodes) else None)

    def _judge(self, job: TrainJob, nodes: list[V1Pod]) -> str | None:
        progress, now = self.progress, datetime.now(UTC)
        waits = not is_running(job, nodes)
        if (waits, is_suspended(job)) != (progress.waiting_since is not None, progress.suspended):
            return "state"
        if not (progress.disrupted or progress.suspended) and find_disrupted(nodes, self.container):
            return "disrupted"
        if progress.waiting_since is None:
            return None
        if self.startup_timeout is not None and find_stuck(nodes, self.startup_timeout, now):
            return "startup_timeout"
        waited = now.timestamp() - progress.waiting_since
        return "queue_timeout" if self.queue_timeout is not None and waited > self.queue_timeout else None

    async def _has_new_lines(self, core: CoreV1Api, nodes: list[V1Pod]) -> bool:
        pod = next((pod for pod in newest(nodes) if rank(pod) == 0), None)
        if pod is None or pod.status.phase == "Pending":
            return False
        since = seconds_to_read(self.progress.log, pod.metadata.uid, datetime.now(UTC))
        newer: dict[str, Any] = {} if since is None else {"since_seconds": since}
        try:
            text = await core.read_namespaced_pod_log(
                *(pod.metadata.name, pod.metadata.namespace),
                container=self.container,
                timestamps=True,
                tail_lines=1,
                **newer,
            )
        except ApiException as error:
            if error.status in (400, 404):  # the container has not started; the pod is gone
                return False
            raise
        return bool(split_new(split_lines(text), self.progress.log, pod.metadata.uid)[0])


def _event(status: str, **more: str) -> TriggerEvent:
    return TriggerEvent({"status": status, **more})  # type: ignore[no-untyped-call]
