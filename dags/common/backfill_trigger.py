"""Watches the Job of a back-fill from Airflow's triggerer: logs how far its shards are, and says how it ended.

A shard logs its figures as JSON lines; the last line of each pod is read. The triggerer imports this module, so it
needs the repository on its PYTHONPATH.
"""

import asyncio
from collections.abc import AsyncIterator, Collection
from datetime import UTC, datetime
from typing import Any

from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook
from airflow.triggers.base import BaseTrigger, TriggerEvent
from kubernetes_asyncio import client

from dags.common.backfill import describe, read_figures, sum_up
from dags.common.pod_end import (
    ENDED,
    FINAL_REASONS,
    MISSING_REASONS,
    MISSING_SECONDS,
    USER_ERROR_EXIT_CODE,
    say_missing,
    waiting_for,
)
from dags.common.pod_trigger import REQUEST_SECONDS, UNREACHABLE, Access, first_line

POLL_SECONDS = 10.0
REPORT_SECONDS = 60.0  # between two lines of progress, each of which reads the log of every pod
INDEX = "batch.kubernetes.io/job-completion-index"
CONTAINER = "backfill"


class BackfillTrigger(BaseTrigger):
    """Waits for the end of one Job, known by its uid.

    The event has `complete`; the `uid` of the Job if it is, or if it is `hopeless`, as no pod of it can start;
    `reason`, a sentence, and `exit_code`, if a pod said what was wrong; and `figures`, the sums over the shards.

    Args:
        namespace: Of the Job.
        name: Of the Job.
        uid: Of the Job; another one of this name is not trusted, nor deleted.
        conn_id: Airflow's connection to the cluster.
        in_cluster: Whether the triggerer reaches the cluster by the account of its own pod.
    """

    def __init__(self, *, namespace: str, name: str, uid: str, conn_id: str | None, in_cluster: bool | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.namespace, self.name, self.uid = namespace, name, uid
        self.conn_id, self.in_cluster = conn_id, in_cluster
        self._figures: dict[str, dict[str, Any]] = {}  # the last ones of each shard
        self._next_report_at = 0.0
        self._missing_since: datetime | None = None
        self._access = Access(namespace)

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Address of this class, and its arguments."""
        names = ("namespace", "name", "uid", "conn_id", "in_cluster")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """One event, when the Job has ended or is given up. A cluster that does not answer is asked again."""
        while True:
            try:
                async with self._hook().get_conn() as connection:
                    event = await self._look(connection)
                self._access.given()
            except UNREACHABLE as error:
                self.log.warning("The cluster does not answer: %s", first_line(error))
                denied = self._access.judge(error, datetime.now(UTC))
                event = _end(denied) if denied else None
            if event is not None:
                yield TriggerEvent(event)  # type: ignore[no-untyped-call]
                return
            await asyncio.sleep(POLL_SECONDS)

    async def on_kill(self) -> None:
        """Delete the Job: somebody marked the task as failed or successful, or cleared it."""
        options = client.V1DeleteOptions(
            preconditions=client.V1Preconditions(uid=self.uid), propagation_policy="Background"
        )
        async with self._hook().get_conn() as connection:
            try:
                await client.BatchV1Api(connection).delete_namespaced_job(self.name, self.namespace, body=options)
            except client.ApiException as error:
                if error.status not in (404, 409):  # gone, or another one by this name
                    raise

    def _hook(self) -> AsyncKubernetesHook:
        return AsyncKubernetesHook(conn_id=self.conn_id, in_cluster=self.in_cluster)

    async def _look(self, connection: Any) -> dict[str, Any] | None:
        """Log the progress, and judge the Job; None while it is on its way."""
        try:
            job = await client.BatchV1Api(connection).read_namespaced_job(
                self.name, self.namespace, _request_timeout=REQUEST_SECONDS
            )
        except client.ApiException as error:
            if error.status != 404:
                raise
            return _end(f"Job {self.name} is gone: somebody deleted it")
        if job.metadata.uid != self.uid:
            return _end(f"Job {self.name} is another one by now")
        ended = {one.type: one for one in job.status.conditions or [] if one.status == "True"}
        over = "Complete" in ended or "Failed" in ended
        if not over and asyncio.get_running_loop().time() < self._next_report_at:
            return None
        pods = await self._read_pods(client.CoreV1Api(connection))
        self._report(job)
        self._next_report_at = asyncio.get_running_loop().time() + REPORT_SECONDS
        if not over:
            return self._judge_wait(pods, datetime.now(UTC))
        figures = sum_up(self._figures.values())
        if "Complete" in ended:
            return {"complete": True, "uid": self.uid, "reason": "", "exit_code": None, "figures": figures}
        return _judge_failure(self.name, ended["Failed"], pods) | {"figures": figures}

    async def _read_pods(self, api: client.CoreV1Api) -> list[Any]:
        """The Job's pods; takes the last line of each."""
        selector = f"batch.kubernetes.io/controller-uid={self.uid}"
        found = await api.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=REQUEST_SECONDS)
        for pod in sorted(found.items, key=lambda pod: pod.metadata.creation_timestamp):
            if pod.status.phase == "Pending":
                continue
            # Not as text: the client would parse a line that is JSON, and hand on Python's form of it.
            options: dict[str, Any] = {"tail_lines": 1, "_preload_content": False}
            try:
                async with asyncio.timeout(REQUEST_SECONDS):
                    answer: Any = await api.read_namespaced_pod_log(pod.metadata.name, self.namespace, **options)
                    text = (await answer.read()).decode(errors="replace")
            except UNREACHABLE:  # its node is away, or it is gone
                continue
            if figures := read_figures(text):
                self._figures[pod.metadata.labels[INDEX]] = figures
        return list(found.items)

    def _judge_wait(self, pods: Collection[Any], now: datetime) -> dict[str, Any] | None:
        """Give up a Job of which nothing runs, since every pod lacks what it needs to start: an image, a secret."""
        left = [pod for pod in pods if pod.status.phase not in ENDED]
        waits = [(pod, *waiting_for(pod, CONTAINER)) for pod in left]
        if not waits or any(reason not in FINAL_REASONS | MISSING_REASONS for _, reason, _ in waits):
            self._missing_since = None
            return None
        self._missing_since = self._missing_since or now
        if (now - self._missing_since).total_seconds() < MISSING_SECONDS:
            return None
        return _end(say_missing(*waits[0])) | {"hopeless": True, "uid": self.uid}

    def _report(self, job: Any) -> None:
        shards, status = job.spec.completions, job.status
        line = f"{status.succeeded or 0} of {shards} shards finished, {status.active or 0} pods"
        if self._figures:
            line += f"; {describe(sum_up(self._figures.values()))}"
        if status.failed:
            line += f"; {status.failed} pods failed"
        self.log.info("%s.", line)


def _end(reason: str, exit_code: int | None = None) -> dict[str, Any]:
    return {"complete": False, "reason": reason, "exit_code": exit_code, "figures": {}}


def _judge_failure(name: str, condition: Any, pods: Collection[Any]) -> dict[str, Any]:
    """Why the Job failed: the last words of a pod with a mistake in the input, or of any that failed."""
    ends = [
        state.terminated
        for pod in pods
        for state in [status.state for status in pod.status.container_statuses or []]
        if state.terminated and state.terminated.exit_code
    ]
    ends.sort(key=lambda end: end.exit_code != USER_ERROR_EXIT_CODE)
    if not ends:
        return _end(f"Job {name} failed: {condition.reason}: {condition.message}")
    words = ((ends[0].message or "").strip().splitlines() or [ends[0].reason or ""])[-1]
    return _end(f"{words} (Job {name}: {condition.reason})", ends[0].exit_code)
