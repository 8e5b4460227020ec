"""Runs a stage, or another `urm` command, as a pod of a Kubernetes cluster."""

from functools import partial
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException

from dags.common.outcome import MlflowLink, StageMixin, raise_for_exit_code
from dags.common.params import stage_arguments


class UrmPodOperator(KubernetesPodOperator):
    """`urm …` in a pod made from the template; its arguments may be mapped over."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(do_xcom_push=False, **kwargs)

    def execute(self, context: Context) -> None:
        """Run the pod; a deferrable one goes on in `trigger_reentry`."""
        try:
            super().execute(context)
        except AirflowException as error:
            self._explain(error)
            raise

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Go on after the wait for the pod."""
        try:
            super().trigger_reentry(context, event)
        except AirflowException as error:
            self._explain(error)
            raise

    def _explain(self, error: AirflowException) -> None:
        """A pod that ended with the exit code of a user's mistake is not tried again."""
        pod = self.remote_pod or self.pod
        statuses = (pod.status.container_statuses if pod is not None and pod.status else None) or []
        for status in statuses:
            if status.name == self.base_container_name and status.state and status.state.terminated:
                raise_for_exit_code(self.arguments[0], status.state.terminated.exit_code, str(error))


class StagePodOperator(UrmPodOperator, StageMixin):
    """`urm <stage> …` in a pod; success is a result.json, not the pod's word.

    A deferrable pod operator may end as success without its XCom (a pod collected early), so nothing is read from a
    side-car.
    """

    operator_extra_links = (MlflowLink(),)
    inherits_from_skipmixin = True  # what the gate skipped stays skipped when it is cleared without the gate

    def __init__(self, *, stage: str, **kwargs: Any) -> None:
        super().__init__(arguments=partial(stage_arguments, stage), **kwargs)
        self.stage = stage

    def execute(self, context: Context) -> None:
        """Run the pod and read the stage's result."""
        super().execute(context)
        self.finish(context)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        """Go on after the wait for the pod."""
        super().trigger_reentry(context, event)
        self.finish(context)
