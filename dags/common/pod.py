"""Runs a stage, or another `urm` command, as a pod of a Kubernetes cluster."""

import json
from functools import partial
from typing import Any, NoReturn

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferralError
from kubernetes.client import V1DeleteOptions, V1Pod, V1Preconditions
from kubernetes.client.exceptions import ApiException
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential
from urllib3.exceptions import HTTPError

from dags.common.outcome import MlflowLink, StageMixin, raise_for_exit_code
from dags.common.params import stage_arguments
from dags.common.pod_trigger import PodTrigger

IDENTITY = ("dag_id", "run_id", "task_id", "map_index")  # labels of a task's pods, whatever the try
DISRUPTIONS = "urm.pod/disruptions"
REFUSED = (400, 403, 404, 422)  # of a pod that Kubernetes will not take the next time either


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, HTTPError) or (isinstance(error, ApiException) and error.status in (429, *range(500, 600)))


# A request that the cluster did not answer is repeated for about a minute; a retry of the task is not for that.
ask_again = retry(
    retry=retry_if_exception(_is_transient), stop=stop_after_attempt(6), wait=wait_exponential(max=30), reraise=True
)


class UrmPodOperator(KubernetesPodOperator):
    """`urm …` in a pod made from the template; its arguments may be mapped over.

    The task waits in the triggerer from the first moment: `PodTrigger` copies the log and tells how the pod ended. A
    pod that the cluster ended is followed by another one in the same try; only failures of the program spend a retry.
    A task that starts again (its worker was killed, or it was cleared) goes on with the pod that still runs for it.

    Args:
        queue_hours: Longest wait for a node.
        disruptions: Most pods that may follow another one in one try.
    """

    def __init__(self, *, queue_hours: float, disruptions: int, **kwargs: Any) -> None:
        super().__init__(do_xcom_push=False, deferrable=True, **kwargs)
        self.queue_hours = queue_hours
        self.disruptions = disruptions
        self._identity = ""

    def execute(self, context: Context) -> None:
        """Find the pod of this task, or start one, and wait for it in the triggerer."""
        wanted, found = self._request(context), self._list_pods()
        for pod in found:
            if pod.status.phase == "Failed":
                self._delete(pod.metadata.name, pod.metadata.uid)
        going = [pod for pod in found if pod.status.phase != "Failed"]
        if not going:
            self._start(wanted, disruptions=0)
        # One that is being deleted is waited for, too: two never work in the same run directory.
        pod = max(going, key=lambda pod: (pod.metadata.deletion_timestamp is None, pod.metadata.creation_timestamp))
        self.log.info("Going on with pod %s, which an earlier try or worker started.", pod.metadata.name)
        self._wait_for(pod, int((pod.metadata.annotations or {}).get(DISRUPTIONS, 0)))

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Act on how the pod ended.

        Raises:
            AirflowFailException: No retry can help: a mistake in the input, an image or secret that is not there.
            AirflowException: The program failed, or the cluster ended its pods too often; the task is tried again.
        """
        self._delete(event["name"], event["uid"])
        if event["outcome"] == "exited":
            raise_for_exit_code(self.arguments[0], event["exit_code"], event["reason"])
        elif event["outcome"] == "hopeless":
            raise AirflowFailException(event["reason"])
        elif event["outcome"] == "disrupted" and event["disruptions"] < self.disruptions:
            number = event["disruptions"] + 1
            self.log.warning(
                "%s. Another one follows in this try (%d of %d).", event["reason"], number, self.disruptions
            )
            self._start(self._request(context), number)
        else:
            raise AirflowException(event["reason"])

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Go on after the wait; one that failed itself leaves no pod behind."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except TaskDeferralError:
            self.log.error("Nobody watches the pod: has the triggerer the repository on its PYTHONPATH?")
            self._request(context)
            self.on_kill()
            raise

    def on_kill(self) -> None:
        """Delete every pod of this task: somebody marked it as failed or successful, or cleared it."""
        for pod in self._list_pods() if self._identity else []:
            self._delete(pod.metadata.name, pod.metadata.uid)

    def _request(self, context: Context) -> V1Pod:
        """The pod to start; from here on this task's pods can be found."""
        wanted = self.build_pod_request_obj(context)
        labels = wanted.metadata.labels
        self._identity = ",".join(f"{name}={labels[name]}" for name in IDENTITY if name in labels)
        return wanted

    def _start(self, wanted: V1Pod, disruptions: int) -> NoReturn:
        """Create the pod, and wait for it in the triggerer.

        Raises:
            AirflowFailException: Kubernetes does not take such a pod.
            AirflowException: It does not take it now.
        """
        wanted.metadata.annotations = (wanted.metadata.annotations or {}) | {DISRUPTIONS: str(disruptions)}
        name = wanted.metadata.name
        try:
            pod = self._create(wanted)
        except ApiException as error:
            try:
                message = json.loads(error.body)["message"]
            except (TypeError, ValueError, KeyError):
                message = error.reason
            sentence = (
                f"pod {name}: expected the cluster to take it, got {error.status}: {message}; correct what it names."
            )
            if error.status in REFUSED and "exceeded quota" not in message:
                raise AirflowFailException(sentence) from None
            raise AirflowException(sentence) from None
        self._wait_for(pod, disruptions)

    def _wait_for(self, pod: V1Pod, disruptions: int) -> NoReturn:
        """Leave the worker until the pod has ended."""
        self.log.info("Waiting for pod %s (uid %s) in the triggerer.", pod.metadata.name, pod.metadata.uid)
        trigger = PodTrigger(
            namespace=pod.metadata.namespace,
            name=pod.metadata.name,
            uid=pod.metadata.uid,
            queue_seconds=self.queue_hours * 3600,
            disruptions=disruptions,
            conn_id=self.kubernetes_conn_id,
            in_cluster=self.hook.is_in_cluster or None,
        )
        self.defer(trigger=trigger, method_name="trigger_reentry")

    @ask_again
    def _create(self, wanted: V1Pod) -> V1Pod:
        try:
            return self.client.create_namespaced_pod(self.namespace, wanted)
        except ApiException as error:
            if error.status == 409:  # the answer to the first request was lost
                return self.client.read_namespaced_pod(wanted.metadata.name, self.namespace)
            raise

    @ask_again
    def _list_pods(self) -> list[V1Pod]:
        found: list[V1Pod] = self.client.list_namespaced_pod(self.namespace, label_selector=self._identity).items
        return found

    @ask_again
    def _delete(self, name: str, uid: str) -> None:
        """Delete this very pod; one that is gone, or another one by its name, is left alone."""
        options = V1DeleteOptions(preconditions=V1Preconditions(uid=uid))
        try:
            self.client.delete_namespaced_pod(name, self.namespace, body=options)
        except ApiException as error:
            if error.status not in (404, 409):
                raise


class StagePodOperator(UrmPodOperator, StageMixin):
    """`urm <stage> …` in a pod; success is a result.json, not the pod's word."""

    operator_extra_links = (MlflowLink(),)
    inherits_from_skipmixin = True  # what the gate skipped stays skipped when it is cleared without the gate

    def __init__(self, *, stage: str, **kwargs: Any) -> None:
        super().__init__(arguments=partial(stage_arguments, stage), **kwargs)
        self.stage = stage

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Go on after the end of the pod, and read the stage's result."""
        super().trigger_reentry(context, event)
        self.finish(context)
