"""Watches the pod of a task from Airflow's triggerer: copies its log as it grows, and says how it ended.

Airflow's own trigger for pods cannot stand in: after a restart it repeats the whole log and grants the whole time to
start again, three failed requests end its wait, a pod on a lost node keeps it waiting for ever, and it deletes by name.
The triggerer imports this module, so it needs the repository on its PYTHONPATH.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import aiohttp
from airflow.providers.cncf.kubernetes.hooks.kubernetes import AsyncKubernetesHook
from airflow.triggers.base import BaseTrigger, TriggerEvent
from kubernetes_asyncio import client

from dags.common import pod_end
from dags.common.pod_end import CONTAINER, Ending

POLL_SECONDS = 2.0
ENDING_POLL_SECONDS = 0.25  # of a pod that is being deleted: its last words go with it
REQUEST_SECONDS = 30
CLOCKS_APART_SECONDS = 60  # how far this clock and that of a node may differ; lines read twice are told by their time
# How often the place in the log is noted on the pod: after a restart of the triggerer, lines since then come twice.
NOTE_SECONDS = 60
LOGGED_UNTIL = "urm.pod/logged-until"
UNREACHABLE = (client.ApiException, aiohttp.ClientError, asyncio.TimeoutError, OSError)


class PodTrigger(BaseTrigger):
    """Waits for the end of one pod, known by its uid.

    Args:
        namespace: Of the pod.
        name: Of the pod.
        uid: Of the pod; another one of this name is not trusted, nor deleted.
        queue_seconds: Longest wait for a node.
        disruptions: Pods of this try before it; handed back with the event.
        conn_id: Airflow's connection to the cluster.
        in_cluster: Whether the triggerer reaches the cluster by the account of its own pod.
    """

    def __init__(
        self,
        *,
        namespace: str,
        name: str,
        uid: str,
        queue_seconds: float,
        disruptions: int,
        conn_id: str | None,
        in_cluster: bool | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.namespace, self.name, self.uid = namespace, name, uid
        self.queue_seconds, self.disruptions = queue_seconds, disruptions
        self.conn_id, self.in_cluster = conn_id, in_cluster
        self._position: str | None = None  # time of the last line of the log that was copied
        self._noted_at: datetime | None = None
        self._missing_since: datetime | None = None
        self._forbidden_since: datetime | None = None
        self._disruption: str | None = None
        self._said = ""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Address of this class, and its arguments."""
        names = ("namespace", "name", "uid", "queue_seconds", "disruptions", "conn_id", "in_cluster")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """One event, when the pod has ended or is given up. A cluster that does not answer is asked again."""
        hook = self._hook()
        while True:
            try:
                async with hook.get_conn() as connection:
                    ending = await self._look(client.CoreV1Api(connection))
            except UNREACHABLE as error:
                ending = self._judge_error(error, datetime.now(UTC))
            if ending is not None:
                break
            await asyncio.sleep(ENDING_POLL_SECONDS if self._disruption else POLL_SECONDS)
        place = {"namespace": self.namespace, "name": self.name, "uid": self.uid, "disruptions": self.disruptions}
        yield TriggerEvent(asdict(ending) | place)  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """Delete the pod: somebody marked the task as failed or successful, or cleared it."""
        async with self._hook().get_conn() as connection:
            self.log.info("Deleting pod %s.", self.name)
            options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=self.uid))
            try:
                await client.CoreV1Api(connection).delete_namespaced_pod(self.name, self.namespace, body=options)
            except client.ApiException as error:
                if error.status not in (404, 409):  # gone, or another one by this name
                    raise

    def _hook(self) -> AsyncKubernetesHook:
        return AsyncKubernetesHook(conn_id=self.conn_id, in_cluster=self.in_cluster)

    def _judge_error(self, error: BaseException, now: datetime) -> Ending | None:
        """A cluster that does not answer is waited for, one that refuses for a while is not."""
        self._say(f"The cluster does not answer: {_first_line(error)}")
        forbidden = isinstance(error, client.ApiException) and error.status in (401, 403)
        self._forbidden_since = (self._forbidden_since or now) if forbidden else None
        if self._forbidden_since is None or (now - self._forbidden_since).total_seconds() < pod_end.MISSING_SECONDS:
            return None
        expected = f"the rights of the role urm-airflow in namespace {self.namespace}"
        return Ending(
            "failed", f"pod {self.name}: expected {expected}, got {_first_line(error)}; bind the triggerer's account."
        )

    async def _look(self, api: client.CoreV1Api) -> Ending | None:
        """Copy what is new in the log, and judge the pod; None while it is on its way."""
        try:
            pod = await api.read_namespaced_pod(self.name, self.namespace, _request_timeout=REQUEST_SECONDS)
        except client.ApiException as error:
            if error.status != 404:
                raise
            pod = None
        if pod is None or pod.metadata.uid != self.uid:
            return Ending(
                "disrupted", f"pod {self.name} is gone: {self._disruption or 'the cluster or somebody deleted it'}"
            )
        now = datetime.now(UTC)
        self._disruption = pod_end.disruption(pod)
        self._forbidden_since = None
        self._say(f"Pod {self.name} {pod_end.describe(pod)}")
        if pod_end.has_started(pod):
            try:
                await self._copy_log(api, pod, now)
            except UNREACHABLE as error:
                self._say(f"The log of pod {self.name} cannot be read now: {_first_line(error)}")
        if ending := pod_end.judge_end(pod, now):
            return ending
        if pod_end.has_started(pod):
            return None
        missing = pod_end.waiting_for(pod)[0] in pod_end.MISSING_REASONS
        self._missing_since = (self._missing_since or now) if missing else None
        return pod_end.judge_wait(pod, now, self.queue_seconds, self._missing_since)

    async def _copy_log(self, api: client.CoreV1Api, pod: Any, now: datetime) -> None:
        """Copy lines that are newer than the last one copied."""
        if self._position is None:
            self._position = (pod.metadata.annotations or {}).get(LOGGED_UNTIL, "")
        options: dict[str, Any] = {"container": CONTAINER, "timestamps": True, "_preload_content": False}
        if self._position:
            behind = (now - _moment(self._position)[0]).total_seconds() + CLOCKS_APART_SECONDS
            options["since_seconds"] = max(1, math.ceil(behind))
        async with asyncio.timeout(REQUEST_SECONDS):
            answer: Any = await api.read_namespaced_pod_log(self.name, self.namespace, **options)
            text = (await answer.read()).decode(errors="replace")
        before = self._position
        for line in filter(None, text.split("\n")):
            time, _, words = line.partition(" ")
            if not self._position or _moment(time) > _moment(self._position):
                # A progress bar writes over itself, so that one line has all its states; a terminal shows the last.
                self.log.info("%s", words.rstrip("\r").rpartition("\r")[2])
                self._position = time
        if self._position != before and (
            self._noted_at is None or (now - self._noted_at).total_seconds() >= NOTE_SECONDS
        ):
            self._noted_at = now
            note = {"metadata": {"uid": self.uid, "annotations": {LOGGED_UNTIL: self._position}}}
            await api.patch_namespaced_pod(self.name, self.namespace, note)

    def _say(self, text: str) -> None:
        """Log what has changed."""
        if text != self._said:
            self._said = text
            self.log.info("%s", text)


def _moment(time: str) -> tuple[datetime, str]:
    """Order of the times of log lines, which have nine decimals: Python keeps six, the text has the rest."""
    return datetime.fromisoformat(time), time


def _first_line(error: BaseException) -> str:
    if isinstance(error, client.ApiException):
        return f"{error.status} {error.reason}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
