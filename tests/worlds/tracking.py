"""MLflow as a training meets it while its server is away."""

from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException


def forbid_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let metrics and tags fail that their caller waits for; a thread may send them."""
    for name in ("log_metrics", "set_tag"):
        function = getattr(mlflow, name)

        def call(*arguments: Any, _function: Any = function, synchronous: bool = True, **named: Any) -> Any:
            if synchronous:
                raise MlflowException("status 503")
            return _function(*arguments, synchronous=False, **named)

        monkeypatch.setattr(mlflow, name, call)
