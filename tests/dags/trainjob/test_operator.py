"""The operator of a TrainJob and its trigger, against an API server that answers as a cluster would.

`Fit` plays Airflow's part: it gives the trigger to a triggerer, as it would be after a restart, and its event to a new
worker. Where a cluster runs the TrainJob's pods, see tests/cluster.
"""

import asyncio
import logging
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubeflow_trainer_api import models

from dags.trainjob.cluster import CHECKED_LABEL, TASK_LABEL
from dags.trainjob.operator import STATE_KEY, TrainJobOperator
from tests.worlds.deferral import DeferredTask, Store
from tests.worlds.trainer import NAMESPACE


def make_job(suspend=True):
    return models.TrainerV1alpha1TrainJob(
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(
            name="fit", labels={"kueue.x-k8s.io/queue-name": "gpus"}
        ),
        spec=models.TrainerV1alpha1TrainJobSpec(
            suspend=suspend,
            runtime_ref=models.TrainerV1alpha1RuntimeRef(name="torch"),
            trainer=models.TrainerV1alpha1Trainer(num_nodes=2, command=["fit", "{{ run_id }}"]),
        ),
    )


class Fit(DeferredTask):
    """A task `fit` whose worker and triggerer are new each time."""

    def __init__(self, store=None, **arguments):
        usual = {
            "train_job": make_job(),
            "poll_interval": 0.01,
            "logging_interval": 0,
            "minimum_wait": 0,
            "deferrable": True,
        }
        ti = SimpleNamespace(dag_id="d", task_id="fit", run_id="r", map_index=-1, xcom_push=lambda key, value: None)
        context = {"ti": ti, "run_id": "r"} | ({} if store is None else {"task_state_store": store})
        super().__init__(lambda: TrainJobOperator(task_id="fit", **usual | arguments), context)


@pytest.fixture
def told(caplog, monkeypatch):
    """Lines of the task's log."""
    monkeypatch.setattr(TrainJobOperator, "log", logging.getLogger("task"))  # Airflow's own is structlog's
    caplog.set_level(logging.INFO)

    def read():
        lines = [record.getMessage() for record in caplog.records]
        return [line for line in lines if line.startswith(("[", "TrainJob"))]

    return read


def test_a_queued_job_is_admitted_preempted_resumed_and_complete(trainer, told):
    task = Fit()
    task.start()
    name = trainer.only_job()["metadata"]["name"]
    trainer.suspend(False)
    assert task.step() == "state"  # admitted
    first, _ = trainer.start()
    trainer.write(first, "step 1", "step 2")
    assert task.step() == "state"  # runs
    trainer.write(first, "step 3")
    assert task.step() == "log"
    trainer.write(first, "saved")
    trainer.pods[first]["metadata"]["deletionTimestamp"] = "2026-11-28T10:00:00Z"
    trainer.only_job()["spec"]["suspend"] = True
    assert task.step() == "state"  # preempted: the pod has its grace period
    trainer.suspend(False)
    again, other = trainer.start()
    trainer.write(again, "resumed at 3")
    assert task.step() == "state"
    trainer.write(again, "done")
    for pod in (again, other):
        trainer.end_pod(pod, 0)
    trainer.end("Complete", "AllJobsCompleted")
    assert task.step() == "finished" and task.ended
    assert (trainer.deleted, trainer.jobs) == ([name], {})
    texts = [line.replace(name, "JOB") for line in told()]
    assert [line.split("] ")[1] for line in texts if line.startswith("[")] == [
        *("step 1", "step 2", "step 3", "saved", "resumed at 3", "done")
    ]
    assert [line.partition(": ")[2] for line in texts if line.startswith("TrainJob JOB: ")] == [
        "0 of 2 pods run",
        "it is suspended and waits for admission",
    ]
    runs = [line.partition(": ")[2] for line in texts if line.startswith("TrainJob JOB runs")]
    assert [line.count("on machine-") for line in runs] == [2, 2] and texts[-1] == "TrainJob JOB is complete"


def test_what_is_submitted(trainer):
    task = Fit(active_deadline_seconds=3600)
    task.start()
    job = trainer.only_job()
    meta, spec = job["metadata"], job["spec"]
    assert (job["kind"], meta["namespace"], meta["name"][:4]) == ("TrainJob", NAMESPACE, "fit-")
    assert meta["labels"]["kueue.x-k8s.io/queue-name"] == "gpus" and TASK_LABEL in meta["labels"]
    assert meta["annotations"]["airflow.apache.org/run_id"] == "r"
    assert spec == {
        "activeDeadlineSeconds": 3600,
        "runtimeRef": {"name": "torch"},
        "suspend": True,
        "trainer": {"numNodes": 2, "command": ["fit", "r"]},  # the template is rendered
    }
    assert task.operator.train_job["spec"]["trainer"]["command"] == ["fit", "r"]  # and shown


def test_names_leave_room_for_those_of_pods(trainer):
    job = make_job()
    job.metadata.name = "a" * 39 + "-" + "b" * 30
    Fit(train_job=job).start()
    name = trainer.only_job()["metadata"]["name"]
    assert len(f"{name}-node-0-0-abcde") <= 63 and name.startswith("a" * 39 + "-")


def test_waiting_has_a_limit_of_its_own(trainer):
    trainer.warnings.append("no quota of nvidia.com/gpu in flavor default")
    task = Fit(queue_timeout=0.2)
    task.start()
    with pytest.raises(AirflowException, match=r"did not run within 0\.2 seconds: it is suspended .*warning: no quota"):
        task.step()
    assert trainer.jobs == {}


def test_a_running_job_does_not_wait(trainer):
    task = Fit(queue_timeout=0.2, train_job=make_job(suspend=False))
    task.start()
    pod, _ = trainer.start()
    assert task.step() == "state"
    asyncio.run(asyncio.sleep(0.3))
    trainer.write(pod, "still there")
    assert task.step() == "log"


def test_a_pod_that_does_not_start_ends_the_wait(trainer):
    task = Fit(startup_timeout=0.1, train_job=make_job(suspend=False))
    task.start()
    pod, _ = trainer.start("Pending")
    with pytest.raises(
        AirflowException, match=rf"did not start within 0\.1 seconds: 0 of 2 pods run; {pod}: ErrImagePull"
    ):
        task.step()
    assert trainer.jobs == {}


def test_the_next_try_goes_on_with_the_job_of_a_killed_worker(trainer, told):
    store = Store()
    task = Fit(store, train_job=make_job(suspend=False))
    task.start()
    pod, _ = trainer.start()
    trainer.write(pod, "step 1")
    task.step()
    assert store[STATE_KEY]["uid"] == trainer.only_job()["metadata"]["uid"]
    task.start()  # a new process, on another try
    trainer.write(pod, "step 2")
    assert (task.step(), len(trainer.jobs)) == ("log", 1)
    assert [line.split("] ")[1] for line in told() if line.startswith("[")] == ["step 1", "step 2"]


def test_a_job_that_was_submitted_but_not_kept_is_found_by_its_label(trainer):
    Fit(Store()).start()
    task = Fit(Store())
    task.start()
    trainer.only_job()
    assert task.kwargs["progress"]["uid"] == trainer.only_job()["metadata"]["uid"]


def test_a_job_that_is_being_deleted_is_waited_for(trainer):
    store = Store()
    task = Fit(store)
    task.start()
    name = trainer.only_job()["metadata"]["name"]
    trainer.only_job()["metadata"]["deletionTimestamp"] = "2026-11-28T10:00:00Z"  # somebody has cleared the task
    task.start()
    assert list(trainer.jobs) == [name]
    trainer.jobs.clear()
    assert task.step() == "lost"  # and that is no disruption
    assert store[STATE_KEY]["name"] in trainer.jobs


def test_a_job_of_the_same_name_with_another_uid_is_left_alone(trainer):
    store = Store()
    task = Fit(store, disruptions=1)
    task.start()
    name = trainer.only_job()["metadata"]["name"]
    trainer.replace(name)
    asyncio.run(task.trigger.on_kill())
    task.operator.on_kill()
    assert trainer.deleted == []
    assert task.step() == "lost"
    assert len(trainer.jobs) == 2 and trainer.jobs[name]["metadata"]["uid"] == "another"
    assert store[STATE_KEY]["name"] != name
    assert CHECKED_LABEL not in trainer.jobs[name]["metadata"]["labels"]


@pytest.mark.parametrize("where", ["triggerer", "worker"])
@pytest.mark.parametrize(("action", "left"), [("delete", 0), ("keep", 1)])
def test_a_person_who_ends_the_task_ends_the_job(where, action, left, trainer):
    task = Fit(on_kill_action=action)
    task.start()
    if where == "triggerer":
        asyncio.run(task.trigger.on_kill())
    else:
        task.operator.on_kill()
    assert len(trainer.jobs) == left


@pytest.mark.parametrize(("code", "retried"), [(1, True), (2, False), (137, True)])
def test_a_failure_names_pod_exit_code_and_last_lines(code, retried, trainer):
    store = Store()
    task = Fit(store, train_job=make_job(suspend=False), fail_on_exit_code=2)
    task.start()
    first, other = trainer.start()
    trainer.write(first, "Traceback", "ValueError: loss is nan")
    trainer.end_pod(first, code, "OOMKilled" if code == 137 else "Error")
    trainer.write(other, "lost its peer")
    trainer.end_pod(other, 1)
    trainer.end("Failed")
    reason = r" \(OOMKilled\)" if code == 137 else ""
    expected = (
        rf"{first} \(rank 0\) on machine-0 ended with exit code {code}{reason}\n  Traceback\n  ValueError: loss is nan$"
    )
    with pytest.raises(AirflowException, match=expected) as caught:
        task.step()
    assert isinstance(caught.value, AirflowFailException) is not retried
    task.start()  # the next try: the failed TrainJob stays to be looked at, and is not taken up again
    assert len(trainer.jobs) == 2 and store[STATE_KEY]["name"] in trainer.jobs


def test_a_deadline_says_so(trainer):
    task = Fit(train_job=make_job(suspend=False))
    task.start()
    trainer.end("Failed", "DeadlineExceeded", "TrainJob exceeded its active deadline")
    with pytest.raises(AirflowException, match="DeadlineExceeded: TrainJob exceeded its active deadline"):
        task.step()


def test_a_disrupted_job_is_submitted_again_within_the_try(trainer):
    store = Store()
    task = Fit(store, train_job=make_job(suspend=False), disruptions=1, on_finish_action="delete")
    task.start()
    for _ in range(2):
        first, other = trainer.start()
        assert task.step() == "state"
        trainer.disrupt(other)
        assert task.step() == "state"
        del trainer.pods[other]  # the node is gone, and its peer fails
        trainer.end_pod(first, 1)
        trainer.end("Failed")
        last = trainer.only_job()["metadata"]["name"]
        if not store[STATE_KEY]["disruptions"]:
            assert task.step() == "finished"
            assert trainer.only_job()["metadata"]["name"] != last
    with pytest.raises(AirflowException, match=r"after a disruption .*`disruptions` allows 1 in a try"):
        task.step()
    assert STATE_KEY not in store


def test_a_disruption_that_was_survived_excuses_no_later_failure(trainer):
    task = Fit(train_job=make_job(suspend=False), disruptions=5)
    task.start()
    _, other = trainer.start()
    task.step()
    trainer.disrupt(other)
    task.step()
    trainer.pods.clear()
    first, _ = trainer.start()  # JobSet has made all pods anew
    assert task.step() == "state"
    trainer.end_pod(first, 1)
    trainer.end("Failed")
    with pytest.raises(AirflowException, match="exit code 1"):
        task.step()


def test_the_end_of_a_replaced_pod_is_read_before_its_successor(trainer, told):
    task = Fit(train_job=make_job(suspend=False))
    task.start()
    old, _ = trainer.start()
    trainer.write(old, "one")
    task.step()
    trainer.write(old, "two")
    trainer.end_pod(old, 143)
    new, _ = trainer.start()
    trainer.write(new, "three")
    task.step()
    assert [line.split("] ")[1] for line in told() if line.startswith("[")] == ["one", "two", "three"]


def test_an_api_server_that_is_away_is_asked_again(trainer):
    task = Fit()
    task.start()
    trainer.refused = [503, 500, 429]
    trainer.suspend(False)
    assert task.step() == "state"
    assert trainer.refused == []


def test_a_worker_that_the_api_server_does_not_answer_comes_back(trainer, told):
    task = Fit(train_job=make_job(suspend=False))
    task.start()
    pod, _ = trainer.start()
    trainer.write(pod, "one")
    answered = trainer.answer

    def answer(method, address, body):
        if address.endswith("/log?container=node&timestamps=True"):  # of the worker, which reads the whole
            trainer.answer = answered
            return 503, {"message": "the server is busy"}
        return answered(method, address, body)

    trainer.answer = answer
    task.step()
    assert not [line for line in told() if line.startswith("[")]
    task.step()
    assert [line.split("] ")[1] for line in told() if line.startswith("[")] == ["one"]


def test_the_task_stays_deferred_until_the_scheduler_has_heard_of_its_last_process(trainer, monkeypatch):
    task = Fit(minimum_wait=30)
    task.start()
    trainer.suspend(False)
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr("dags.trainjob.trigger.asyncio.sleep", sleep)
    assert task.step() == "state"
    assert 20 < sum(slept) <= 30


def test_a_triggerer_without_rights_says_so(trainer):
    task = Fit()
    task.start()
    trainer.refused = [403]
    with pytest.raises(AirflowException, match=r"the triggerer may not watch it \(403 Forbidden"):
        task.step()


def test_a_worker_can_wait_itself(trainer):
    def act():
        trainer.suspend(False)
        for pod in trainer.start():
            trainer.end_pod(pod, 0)
        trainer.end("Complete")

    trainer_submits = trainer.answer

    def answer(method, *arguments):
        found = trainer_submits(method, *arguments)
        if method == "POST":
            act()
        return found

    trainer.answer = answer
    Fit(deferrable=False).start()
    assert trainer.jobs == {}
