"""Runs a stage, or another `urm` command, as a pod of a Kubernetes cluster."""

from functools import partial
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferralError
from kubernetes.client import ApiClient, V1DeleteOptions, V1Pod, V1Preconditions
from kubernetes.client.exceptions import ApiException
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential
from urllib3.exceptions import HTTPError

from dags.common.outcome import MlflowLink, StageMixin, raise_for_exit_code
from dags.common.params import stage_arguments
from dags.common.pod_trigger import PodTrigger, judge_refusal

IDENTITY = ("dag_id", "run_id", "task_id", "map_index")  # labels of a task's pods, whatever the try


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, HTTPError) or (isinstance(error, ApiException) and error.status in (429, *range(500, 600)))


# A request that the cluster did not answer is repeated for about a minute; a retry of the task is not for that.
ask_again = retry(
    retry=retry_if_exception(_is_transient), stop=stop_after_attempt(6), wait=wait_exponential(max=30), reraise=True
)


class UrmPodOperator(KubernetesPodOperator):
    """`urm …` in a pod made from the template; its arguments may be mapped over.

    The task waits in the triggerer from the first moment: `PodTrigger` copies the pod's log, and tells how it ended. A
    try goes on with the pod that an earlier one, or a killed worker, has left at work.

    Args:
        queue_hours: Longest wait for a node.
        disruptions: Most pods that may follow another one, ended by the cluster, in one try. With none, a full quota
            fails the task: a triggerer that waited for room could not tell after a restart whether there was a pod.
    """

    def __init__(self, *, queue_hours: float, disruptions: int, **kwargs: Any) -> None:
        super().__init__(do_xcom_push=False, deferrable=True, **kwargs)
        self.queue_hours = queue_hours
        self.disruptions = disruptions
        self._selector = ""

    def execute(self, context: Context) -> None:
        """Start the pod, or find the one that works for this task already, and wait in the triggerer for its end.

        Raises:
            AirflowFailException: The cluster will not take such a pod.
        """
        wanted, going = self._request(context), False
        for pod in self._list_pods():
            if pod.status.phase == "Failed":  # in an earlier try, unseen
                self._delete(pod.metadata.name, pod.metadata.uid)
            else:
                going = True
        trigger = PodTrigger(
            manifest=ApiClient().sanitize_for_serialization(wanted),
            selector=self._selector,
            started=going or self._start(wanted),
            queue_seconds=self.queue_hours * 3600,
            disruptions=self.disruptions,
            conn_id=self.kubernetes_conn_id,
            in_cluster=self.hook.is_in_cluster or None,
        )
        self.defer(trigger=trigger, method_name="trigger_reentry")

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Delete the pod, and act on how it ended.

        Raises:
            AirflowFailException: No retry can help: a mistake in the input, an image or secret that is not there.
            AirflowException: The program failed, or the cluster ended its pods too often; the task is tried again.
        """
        if event["pod"]:
            self._delete(event["pod"]["name"], event["pod"]["uid"])
        if event["outcome"] == "exited":
            raise_for_exit_code(self.arguments[0], event["exit_code"], event["reason"])
        elif event["outcome"] == "hopeless":
            raise AirflowFailException(event["reason"])
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
        for pod in self._list_pods() if self._selector else []:
            self._delete(pod.metadata.name, pod.metadata.uid)

    def _request(self, context: Context) -> V1Pod:
        """The pod to start; from here on this task's pods can be found."""
        wanted = self.build_pod_request_obj(context)
        labels = wanted.metadata.labels
        self._selector = ",".join(f"{name}={labels[name]}" for name in IDENTITY if name in labels)
        return wanted

    @ask_again
    def _start(self, wanted: V1Pod) -> bool:
        """Whether the pod is there now; not while a full quota is waited for."""
        try:
            self.client.create_namespaced_pod(self.namespace, wanted)
        except ApiException as error:
            if error.status == 409:  # the answer to the first request was lost
                return True
            ending = judge_refusal(wanted.metadata.name, error)
            if ending.outcome == "hopeless" or not self.disruptions:
                raise AirflowFailException(ending.reason) from None
            return False
        return True

    @ask_again
    def _list_pods(self) -> list[V1Pod]:
        found: list[V1Pod] = self.client.list_namespaced_pod(self.namespace, label_selector=self._selector).items
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
