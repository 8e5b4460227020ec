"""TrainJobs, their pods and logs in a cluster: the requests of the operator."""

from typing import Any

from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob as TrainJob
from kubernetes.client import ApiException, V1DeleteOptions, V1Pod, V1Preconditions
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from dags.trainjob.job import GROUP, JOBSET_LABEL, PLURAL, VERSION, Progress, is_transient
from dags.trainjob.logs import split_lines

TASK_LABEL = "airflow.apache.org/task-instance"  # of a TrainJob: the digest of its task instance, whatever the try
CHECKED_LABEL = "airflow.apache.org/checked"  # its outcome has been told to Airflow; it is not taken up again

# Before anything waits in the triggerer, a request that is not answered is repeated for about a minute.
ask_again = retry(
    retry=retry_if_exception(is_transient), stop=stop_after_attempt(6), wait=wait_exponential(max=30), reraise=True
)


class Cluster:
    """TrainJobs of one connection. Where no error is named, that of the API server is raised."""

    def __init__(self, hook: KubernetesHook) -> None:
        self._hook = hook

    @ask_again
    def create(self, job: TrainJob, *, own_name: bool) -> dict[str, Any]:
        """Submit a TrainJob; returns it as the API server keeps it.

        With a name of its own, one that is there already and has its TASK_LABEL is the same: the answer to the first
        request was lost.
        """
        meta = job.metadata
        try:
            found: dict[str, Any] = self._hook.create_custom_object(
                GROUP, VERSION, PLURAL, job.to_dict(), meta.namespace
            )
        except ApiException as error:
            if error.status != 409:
                raise
            found = self._hook.get_custom_object(GROUP, VERSION, PLURAL, meta.name, meta.namespace)
            labels = found["metadata"].get("labels") or {}
            if not own_name or labels.get(TASK_LABEL) != meta.labels[TASK_LABEL]:
                raise  # another one has the name
        return found

    def get(self, name: str, namespace: str) -> TrainJob | None:
        """The TrainJob of a name; none if there is none."""
        try:
            return TrainJob.from_dict(self._hook.get_custom_object(GROUP, VERSION, PLURAL, name, namespace))
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    def find_unchecked(self, namespace: str, task: str) -> TrainJob | None:
        """The newest TrainJob of a task instance whose outcome has not been told; `task` is the value of TASK_LABEL."""
        items = self._hook.custom_object_client.list_namespaced_custom_object(
            GROUP, VERSION, namespace, PLURAL, label_selector=f"{TASK_LABEL}={task},!{CHECKED_LABEL}"
        )["items"]
        return max(map(TrainJob.from_dict, items), key=lambda job: job.metadata.creation_timestamp, default=None)

    def list_pods(self, job: TrainJob) -> list[V1Pod]:
        """All pods of its JobSet."""
        meta = job.metadata
        pods: list[V1Pod] = self._hook.core_v1_client.list_namespaced_pod(
            meta.namespace, label_selector=f"{JOBSET_LABEL}={meta.name}"
        ).items
        return pods

    def read_log(self, pod: V1Pod, container: str, **options: Any) -> list[str]:
        """Lines of a container's log, none if it has not started or the pod is gone."""
        try:
            answer = self._hook.core_v1_client.read_namespaced_pod_log(
                *(pod.metadata.name, pod.metadata.namespace), container=container, _preload_content=False, **options
            )
        except ApiException as error:
            if error.status not in (400, 404):
                raise
            return []
        return split_lines(answer.data.decode(errors="replace"))

    def last_warning(self, progress: Progress) -> str:
        """The newest warning about a TrainJob, empty where there is none."""
        events = self._hook.core_v1_client.list_namespaced_event(
            progress.namespace, field_selector=f"involvedObject.uid={progress.uid},type=Warning"
        ).items
        return str(events[-1].message) if events else ""

    def delete(self, progress: Progress, propagation_policy: str) -> None:
        """Delete this TrainJob, and none that has taken its name."""
        options = V1DeleteOptions(
            preconditions=V1Preconditions(uid=progress.uid), propagation_policy=propagation_policy
        )
        try:
            self._hook.custom_object_client.delete_namespaced_custom_object(
                GROUP, VERSION, progress.namespace, PLURAL, progress.name, body=options
            )
        except ApiException as error:
            if error.status not in (404, 409):  # gone, or another one
                raise

    def mark_checked(self, progress: Progress) -> None:
        """Note at this TrainJob, and at none that has taken its name, that its outcome has been told."""
        patch = {"metadata": {"uid": progress.uid, "labels": {CHECKED_LABEL: "True"}}}
        try:
            self._hook.custom_object_client.patch_namespaced_custom_object(
                GROUP, VERSION, progress.namespace, PLURAL, progress.name, patch
            )
        except ApiException as error:
            if error.status not in (404, 409, 422):  # gone, or another one
                raise
