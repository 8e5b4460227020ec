"""Runs the pods of a task from Airflow's triggerer: starts one, copies its log as it grows, says how it ended.

A pod that the cluster ended is followed by another one here, within one wait of the task: Airflow 3.3 overwrites what a
triggerer has logged for a try when the task waits again in the same try.

Airflow's own trigger for pods cannot stand in: after a restart it repeats the whole log and grants the whole time to
start again, three failed requests end its wait, a pod on a lost node keeps it waiting for ever, and it deletes by name.
The triggerer imports this module, so it needs the repository on its PYTHONPATH.
"""

import asyncio
import copy
import json
import math
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, Literal

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
NOTE_SECONDS = 20
LOGGED_UNTIL = "urm.pod/logged-until"
DISRUPTIONS = "urm.pod/disruptions"
REFUSED = (400, 403, 404, 422)  # of a pod that the cluster will not take the next time either
UNREACHABLE = (client.ApiException, aiohttp.ClientError, asyncio.TimeoutError, OSError)


class PodTrigger(BaseTrigger):
    """Sees a task's command through: one pod after another, until one ends by itself.

    Whatever it knows stands in the cluster, so that another triggerer can go on: pods are found by their labels, how
    many there were and where the log ended are annotations. Once chosen, a pod is known by its uid; another one of its
    name is neither trusted nor deleted.

    Args:
        manifest: The first pod; the name of a further one ends with its number.
        selector: Labels of the task's pods, whatever the try.
        started: Whether there is a pod already; else a full quota kept the first one out.
        queue_seconds: Longest wait for a node.
        disruptions: Most pods after the first one.
        conn_id: Airflow's connection to the cluster.
        in_cluster: Whether the triggerer reaches the cluster by the account of its own pod.
    """

    def __init__(
        self,
        *,
        manifest: dict[str, Any],
        selector: str,
        started: bool,
        queue_seconds: float,
        disruptions: int,
        conn_id: str | None,
        in_cluster: bool | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.manifest, self.selector, self.started = manifest, selector, started
        self.queue_seconds, self.disruptions = queue_seconds, disruptions
        self.conn_id, self.in_cluster = conn_id, in_cluster
        self.namespace: str = manifest["metadata"]["namespace"]
        self._pod: Any = None  # as last seen
        self._due = False  # whether a pod is to be created
        self._count = 0  # pods that the cluster has ended
        self._position: str | None = None  # time of the last line of the log that was copied
        self._noted_at: datetime | None = None
        self._full_since: datetime | None = None
        self._missing_since: datetime | None = None
        self._access = Access(self.namespace)
        self._disruption: str | None = None
        self._said = ""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Address of this class, and its arguments."""
        names = ("manifest", "selector", "started", "queue_seconds", "disruptions", "conn_id", "in_cluster")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """One event, when a pod has ended by itself or is given up. A cluster that does not answer is asked again."""
        hook = self._hook()
        while True:
            try:
                async with hook.get_conn() as connection:
                    ending = await self._go_on(client.CoreV1Api(connection))
            except UNREACHABLE as error:
                ending = self._judge_error(error, datetime.now(UTC))
            if ending is not None:
                break
            await asyncio.sleep(ENDING_POLL_SECONDS if self._disruption else POLL_SECONDS)
        pod = {"name": self._pod.metadata.name, "uid": self._pod.metadata.uid} if self._pod else None
        yield TriggerEvent(asdict(ending) | {"pod": pod})  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """Delete the pod: somebody marked the task as failed or successful, or cleared it.

        Once it is known, only this very pod: after a clearing, the next try may have one already.
        """
        async with self._hook().get_conn() as connection:
            api = client.CoreV1Api(connection)
            for pod in [self._pod] if self._pod else await self._list_pods(api):
                self.log.info("Deleting pod %s.", pod.metadata.name)
                await self._delete(api, pod)

    def _hook(self) -> AsyncKubernetesHook:
        return AsyncKubernetesHook(conn_id=self.conn_id, in_cluster=self.in_cluster)

    async def _go_on(self, api: client.CoreV1Api) -> Ending | None:
        """Look after the pod, start the next one where it is due; None while the task is on its way."""
        if self._pod is None and not self._due:  # a triggerer before this one may have started a pod
            self._pod = await self._find(api)
            self._due = self._pod is None and not self.started
        if self._due:
            try:
                self._pod, self._due = await self._start(api), False
            except client.ApiException as error:
                return self._wait_for_quota(error, datetime.now(UTC))
        ending = await self._look(api) if self._pod else Ending("disrupted", "no pod of this task is left")
        ours = self._pod is None or self._is_ours(self._pod)
        if ending is None or ending.outcome != "disrupted" or (ours and self._count >= self.disruptions):
            return ending
        self._count += ours
        self.log.warning(
            "%s. Another one follows in this try (%d of %d).", ending.reason, self._count, self.disruptions
        )
        if self._pod:
            await self._delete(api, self._pod)
        self._pod = self._position = self._noted_at = self._missing_since = self._disruption = self._full_since = None
        self._due = True
        return None

    async def _find(self, api: client.CoreV1Api) -> Any:
        """The task's pod; one that is being deleted is waited for, too: two never work in the same run directory."""
        found = await self._list_pods(api)
        if not found:
            return None
        pod = max(found, key=lambda pod: (pod.metadata.deletion_timestamp is None, pod.metadata.creation_timestamp))
        if self._is_ours(pod):
            self._count = int((pod.metadata.annotations or {}).get(DISRUPTIONS, 0))
        self.log.info("Watching pod %s.", pod.metadata.name)
        return pod

    def _is_ours(self, pod: Any) -> bool:
        """Whether this try has started the pod; one of an earlier try, which clearing the task deletes, counts not."""
        same: bool = pod.metadata.labels["try_number"] == self.manifest["metadata"]["labels"]["try_number"]
        return same

    async def _start(self, api: client.CoreV1Api) -> Any:
        """Create the pod of this number; one that is there already was created by a request whose answer was lost."""
        wanted: Any = copy.deepcopy(self.manifest)
        metadata = wanted["metadata"]
        metadata["annotations"] = {**(metadata.get("annotations") or {}), DISRUPTIONS: str(self._count)}
        if self._count:
            metadata["name"] += f"-{self._count}"
        try:
            return await api.create_namespaced_pod(self.namespace, wanted, _request_timeout=REQUEST_SECONDS)
        except client.ApiException as error:
            if error.status != 409:
                raise
            return await api.read_namespaced_pod(metadata["name"], self.namespace, _request_timeout=REQUEST_SECONDS)

    async def _look(self, api: client.CoreV1Api) -> Ending | None:
        """Copy what is new in the log, and judge the pod; None while it is on its way."""
        name, uid = self._pod.metadata.name, self._pod.metadata.uid
        try:
            pod = await api.read_namespaced_pod(name, self.namespace, _request_timeout=REQUEST_SECONDS)
        except client.ApiException as error:
            if error.status != 404:
                raise
            pod = None
        if pod is None or pod.metadata.uid != uid:
            return Ending(
                "disrupted", f"pod {name} is gone: {self._disruption or 'the cluster or somebody deleted it'}"
            )
        self._pod, now = pod, datetime.now(UTC)
        self._access.given()
        self._disruption = pod_end.disruption(pod)
        self._say(f"Pod {name} {pod_end.describe(pod)}")
        if pod_end.has_started(pod):
            try:
                await self._copy_log(api, now)
            except UNREACHABLE as error:
                self._say(f"The log of pod {name} cannot be read now: {first_line(error)}")
        if ending := pod_end.judge_end(pod, now):
            return ending
        if pod_end.has_started(pod):
            return None
        missing = pod_end.waiting_for(pod)[0] in pod_end.MISSING_REASONS
        self._missing_since = (self._missing_since or now) if missing else None
        return pod_end.judge_wait(pod, now, self.queue_seconds, self._missing_since)

    async def _copy_log(self, api: client.CoreV1Api, now: datetime) -> None:
        """Copy lines that are newer than the last one copied."""
        metadata = self._pod.metadata
        if self._position is None:
            self._position = (metadata.annotations or {}).get(LOGGED_UNTIL, "")
        options: dict[str, Any] = {"container": CONTAINER, "timestamps": True, "_preload_content": False}
        if self._position:
            behind = (now - _moment(self._position)[0]).total_seconds() + CLOCKS_APART_SECONDS
            options["since_seconds"] = max(1, math.ceil(behind))
        async with asyncio.timeout(REQUEST_SECONDS):
            answer: Any = await api.read_namespaced_pod_log(metadata.name, self.namespace, **options)
            text = (await answer.read()).decode(errors="replace")
        before = self._position
        for number, line in enumerate(filter(None, text.split("\n"))):
            if number % 500 == 0:
                await asyncio.sleep(0)  # other triggers go on, too
            time, _, words = line.partition(" ")
            try:
                is_new = _moment(time) > _moment(self._position or time) or not self._position
            except ValueError:  # a node says in place of a log that it has none any more, with status 200
                self._say(f"The log of pod {metadata.name} cannot be read now: {line}")
                continue
            if is_new:
                # A progress bar writes over itself, so that one line has all its states; a terminal shows the last.
                self.log.info("%s", words.rstrip("\r").rpartition("\r")[2])
                self._position = time
        noted = self._noted_at is not None and (now - self._noted_at).total_seconds() < NOTE_SECONDS
        if self._position != before and not noted:
            self._noted_at = now
            note = {"metadata": {"uid": metadata.uid, "annotations": {LOGGED_UNTIL: self._position}}}
            await api.patch_namespaced_pod(metadata.name, self.namespace, note, _request_timeout=REQUEST_SECONDS)

    async def _list_pods(self, api: client.CoreV1Api) -> list[Any]:
        answer = await api.list_namespaced_pod(
            self.namespace, label_selector=self.selector, _request_timeout=REQUEST_SECONDS
        )
        return list(answer.items)

    async def _delete(self, api: client.CoreV1Api, pod: Any) -> None:
        """Delete this very pod; one that is gone, or another one by its name, is left alone."""
        options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=pod.metadata.uid))
        try:
            await api.delete_namespaced_pod(
                pod.metadata.name, self.namespace, body=options, _request_timeout=REQUEST_SECONDS
            )
        except client.ApiException as error:
            if error.status not in (404, 409):
                raise

    def _wait_for_quota(self, error: client.ApiException, now: datetime) -> Ending | None:
        """A full quota is waited for like a node; what else the cluster does not take is given up."""
        ending = judge_refusal(self.manifest["metadata"]["name"], error)
        self._say(ending.reason)
        self._full_since = self._full_since or now
        waited = (now - self._full_since).total_seconds()
        return (
            None if ending.outcome == "failed" and waited < self.queue_seconds else replace(ending, outcome="hopeless")
        )

    def _judge_error(self, error: BaseException, now: datetime) -> Ending | None:
        """A cluster that does not answer is waited for, one that refuses for a while is not."""
        self._say(f"The cluster does not answer: {first_line(error)}")
        denied = self._access.judge(error, now)
        return Ending("failed", denied) if denied else None

    def _say(self, text: str) -> None:
        """Log what has changed."""
        if text != self._said:
            self._said = text
            self.log.info("%s", text)


class Access:
    """Whether the triggerer may look at the cluster: a refusal that lasts is no disturbance."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._denied_since: datetime | None = None

    def given(self) -> None:
        """Note an answer."""
        self._denied_since = None

    def judge(self, error: BaseException, now: datetime) -> str | None:
        """What to say of a cluster that has refused for a while; None if it does not, or may do better."""
        denied = isinstance(error, client.ApiException) and error.status in (401, 403)
        self._denied_since = (self._denied_since or now) if denied else None
        if self._denied_since is None or (now - self._denied_since).total_seconds() < pod_end.MISSING_SECONDS:
            return None
        expected = f"the rights of the role urm-airflow in namespace {self._namespace}"
        return f"triggerer: expected {expected}, got {first_line(error)}; bind its account to the role."


def judge_refusal(name: str, error: Any) -> Ending:
    """Why the cluster does not take a pod, from an error of either client: `failed` where a quota is full.

    Raises:
        ApiException: It has not judged the pod.
    """
    if error.status not in REFUSED:
        raise error
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    outcome: Literal["failed", "hopeless"] = "failed" if "exceeded quota" in message else "hopeless"
    return Ending(outcome, f"pod {name}: expected the cluster to take it, got {message}; correct what it names.")


def _moment(time: str) -> tuple[datetime, str]:
    """Order of the times of log lines, which have nine decimals: Python keeps six, the text has the rest."""
    return datetime.fromisoformat(time), time


def first_line(error: BaseException) -> str:
    """An error of the cluster in a line."""
    if isinstance(error, client.ApiException):
        return f"{error.status} {error.reason}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
