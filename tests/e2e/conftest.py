"""Real services in a home of their own: Airflow, MLflow, Redis, recall worker and API, started by `urm up`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest

from components.local.airflow import USERNAME, AirflowClient, read_credentials
from components.local.registry import Registry
from components.settings import Settings
from tests.worlds import REPOSITORY


class Urm:
    """The `urm` command in one home folder.

    Args:
        home: Folder of the services' state.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        # Caches are keyed by content, so one folder may serve every run of these tests.
        own = {name for name in os.environ if name.startswith("URM_")} - {"URM_CACHE_DIR"}
        self._environment = {name: value for name, value in os.environ.items() if name not in own}
        self._environment |= {"URM_HOME": str(home), "OMP_NUM_THREADS": "1"}

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end, from the root of the repository."""
        command = [Path(sys.executable).with_name("urm"), *arguments]
        options = {"cwd": REPOSITORY, "env": self._environment, "check": False}
        return subprocess.run(command, capture_output=True, text=True, **options)

    @property
    def settings(self) -> Settings:
        """Settings that lead to the running services."""
        return Settings(_env_file=self.home / "services.env", home=self.home)

    @cached_property
    def airflow(self) -> AirflowClient:
        """Client of the running Airflow."""
        password = read_credentials(self.home / "airflow")["password"]
        return AirflowClient(self.settings.airflow_url, USERNAME, password)


@pytest.fixture(scope="module")  # the services end with the last test of the file
def urm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urm]:
    """The command, with all services up."""
    command = Urm(tmp_path_factory.mktemp("e2e") / ".urm")
    try:
        started = command("up")
        assert started.returncode == 0, started.stdout + started.stderr
        yield command
        command.airflow.close()
    finally:
        stopped = command("down")
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        assert not Registry(command.home).read()
