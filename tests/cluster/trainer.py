"""Plays the part of Kubeflow Trainer, JobSet and Kueue, for clusters that have their CRDs and no controllers.

A TrainJob becomes an Indexed Job of Kubernetes, as JobSet would make it of our TrainingRuntime; pods, suspension,
indexes, disruptions and pod failures are the cluster's own. Written after Trainer v2.3 (`pkg/controller`, plugins
`torch` and `jobset`) and JobSet v0.12. One difference: the first node is found by a Service of its own instead of a
headless one, since the DNS of a test cluster may know no pods.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from kubernetes import client

GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
PORT = 29500  # of torchrun's rendezvous
Object = dict[str, Any]


class TrainerController:
    """Reconciles the TrainJobs of a namespace until it is left.

    Args:
        api: Client of the cluster, as administrator.
        namespace: The namespace.
    """

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._batch = client.BatchV1Api(api)
        self._restarts: dict[str, int] = {}
        self._stop = threading.Event()
        self.error: BaseException | None = None

    @contextmanager
    def running(self) -> Iterator["TrainerController"]:
        """Reconcile while the body runs."""
        thread = threading.Thread(target=self._loop)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
        if self.error:
            raise self.error

    def suspend(self, name: str, suspended: bool) -> None:
        """What Kueue does with a TrainJob: admit it, or preempt it."""
        self._objects.patch_namespaced_custom_object(
            GROUP, VERSION, self.namespace, "trainjobs", name, {"spec": {"suspend": suspended}}
        )

    def _loop(self) -> None:
        while not self._stop.wait(0.3):
            try:
                found = self._objects.list_namespaced_custom_object(GROUP, VERSION, self.namespace, "trainjobs")
                for job in found["items"]:
                    if "deletionTimestamp" not in job["metadata"]:
                        self._reconcile(job)
            except client.ApiException as error:
                if error.status not in (404, 409):  # somebody else was faster
                    self.error = error
                    return

    def _reconcile(self, train_job: Object) -> None:
        conditions = {one["type"]: one for one in train_job.get("status", {}).get("conditions", [])}
        if any(conditions.get(kind, {}).get("status") == "True" for kind in ("Complete", "Failed")):
            return
        name, suspended = train_job["metadata"]["name"], train_job["spec"].get("suspend", False)
        if suspended != (conditions.get("Suspended", {}).get("status") == "True"):
            status, reason = ("True", "Suspended") if suspended else ("False", "Resumed")
            self._set(train_job, "Suspended", status, reason, f"TrainJob is {reason.lower()}")
        try:
            job = self._batch.read_namespaced_job(f"{name}-node-0", self.namespace)
        except client.ApiException as error:
            if error.status != 404:
                raise
            self._create(train_job)
            return
        if job.metadata.deletion_timestamp:
            return
        if bool(job.spec.suspend) != suspended:
            self._batch.patch_namespaced_job(job.metadata.name, self.namespace, {"spec": {"suspend": suspended}})
        true = {one.type: one for one in job.status.conditions or [] if one.status == "True"}
        if "Complete" in true:
            self._set(train_job, "Complete", "True", "AllJobsCompleted", "jobset completed successfully")
        elif "Failed" in true:
            self._fail(train_job, job, true["Failed"])

    def _fail(self, train_job: Object, job: Any, condition: Any) -> None:
        """JobSet's failure policy: start all nodes again, or give up."""
        policy, uid = self._runtime(train_job)["template"]["spec"]["failurePolicy"], train_job["metadata"]["uid"]
        gives_up = any(condition.reason in rule["onJobFailureReasons"] for rule in policy["rules"])
        restarts = self._restarts.get(uid, 0)
        if gives_up or restarts >= policy["maxRestarts"]:
            message = f"jobset failed due to one or more job failures (first failed job: {job.metadata.name})"
            self._set(train_job, "Failed", "True", "FailedJobs", message)
            return
        self._restarts[uid] = restarts + 1
        self._batch.delete_namespaced_job(job.metadata.name, self.namespace, propagation_policy="Foreground")

    def _runtime(self, train_job: Object) -> Object:
        name = train_job["spec"]["runtimeRef"]["name"]
        found = self._objects.get_namespaced_custom_object(GROUP, VERSION, self.namespace, "trainingruntimes", name)
        spec: Object = found["spec"]
        return spec

    def _create(self, train_job: Object) -> None:
        meta, trainer = train_job["metadata"], train_job["spec"]["trainer"]
        name = meta["name"]
        (replicated,) = self._runtime(train_job)["template"]["spec"]["replicatedJobs"]
        owner = {
            "apiVersion": f"{GROUP}/{VERSION}", "kind": "TrainJob", "name": name, "uid": meta["uid"],
            "controller": True, "blockOwnerDeletion": True,
        }  # fmt: skip
        own = {"jobset.sigs.k8s.io/jobset-name": name, "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"]}
        first = {**own, "batch.kubernetes.io/job-completion-index": "0"}
        service = {
            "metadata": {"name": name, "ownerReferences": [owner]},
            "spec": {"selector": first, "ports": [{"port": PORT}], "publishNotReadyAddresses": True},
        }
        template = replicated["template"]["spec"]["template"]
        pod = template["spec"]
        (container,) = pod["containers"]
        container |= {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
        container["resources"] = trainer.get("resourcesPerNode", {})
        container["ports"] = [{"containerPort": PORT}]
        container["env"] = [*container.get("env", []), *trainer.get("env", []), *_variables(name, trainer)]
        for patch in train_job["spec"].get("runtimePatches", []):
            (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
            _apply(pod, node["template"]["spec"]["template"]["spec"])
        spec = {
            **replicated["template"]["spec"],
            "completionMode": "Indexed",
            "completions": trainer["numNodes"],
            "parallelism": trainer["numNodes"],
            "suspend": train_job["spec"].get("suspend", False),
            "template": {"metadata": {"labels": {**template["metadata"]["labels"], **own}}, "spec": pod},
        }
        job = {"metadata": {"name": f"{name}-node-0", "labels": own, "ownerReferences": [owner]}, "spec": spec}
        try:
            self._core.create_namespaced_service(self.namespace, service)
        except client.ApiException as error:
            if error.status != 409:  # it is there from before a restart
                raise
        self._batch.create_namespaced_job(self.namespace, job)

    def _set(self, train_job: Object, kind: str, status: str, reason: str, message: str) -> None:
        """Set a condition of its status."""
        others = [one for one in train_job.get("status", {}).get("conditions", []) if one["type"] != kind]
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        condition = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now}
        train_job["status"] = {**train_job.get("status", {}), "conditions": [*others, condition]}
        self._objects.patch_namespaced_custom_object_status(
            *(GROUP, VERSION, self.namespace, "trainjobs", train_job["metadata"]["name"]),
            {"status": {"conditions": train_job["status"]["conditions"]}},
        )


def _variables(name: str, trainer: Object) -> list[Object]:
    """What Trainer's torch plugin tells torchrun."""
    index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    return [
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": index}},
        {"name": "PET_MASTER_ADDR", "value": name},
        {"name": "PET_MASTER_PORT", "value": str(PORT)},
    ]


def _apply(pod: Object, patch: Object) -> None:
    """Patch a pod as Trainer does: lists with names by name, others as a whole."""
    for key, value in patch.items():
        if key == "containers":
            for one in value:
                container = next(each for each in pod["containers"] if each["name"] == one["name"])
                container["volumeMounts"] = [*container.get("volumeMounts", []), *one["volumeMounts"]]
        elif key == "volumes":
            names = {one["name"] for one in value}
            pod[key] = [one for one in pod.get(key, []) if one["name"] not in names] + value
        else:
            pod[key] = value
