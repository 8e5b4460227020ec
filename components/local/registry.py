"""What runs on this machine: `services.json` for the local commands, `services.env` for every other one."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from components.exceptions import DataError, UnavailableError
from components.local.processes import ProcessRecord


class ServiceRecord(BaseModel):
    """A service as it was started."""

    model_config = ConfigDict(frozen=True)

    process: ProcessRecord
    port: int  # loopback port; 0 for a service without one
    url: str  # its address; empty for one without
    log: Path  # file with its output
    fingerprint: str  # of its command and environment; a service that would now be started otherwise is restarted


_RECORDS = TypeAdapter(dict[str, ServiceRecord])


class Registry:
    """The two files in the home folder."""

    def __init__(self, home: Path) -> None:
        self.path = home / "services.json"
        self.env_path = home / "services.env"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands from starting or stopping services meanwhile.

        Raises:
            UnavailableError: Another command is starting or stopping them.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UnavailableError(
                    f"services in {self.path.parent}",
                    expected="one command at a time",
                    got="another `urm up`, `urm down` or `urm demo` that starts or stops them",
                    remedy="wait for it",
                ) from None
            yield

    def read(self) -> dict[str, ServiceRecord]:
        """Services by name, in the order in which they were started.

        Raises:
            DataError: The file is no registry of this version.
        """
        if not self.path.exists():
            return {}
        try:
            return _RECORDS.validate_json(self.path.read_bytes())
        except ValidationError as error:
            raise DataError(
                f"service registry {self.path}",
                expected="a file written by this version",
                got=f"{error.error_count()} field(s) that do not fit",
                remedy="end the processes named in it and delete it",
            ) from None

    def write(self, records: dict[str, ServiceRecord]) -> None:
        """Replace the registry at once."""
        content = {name: record.model_dump(mode="json") for name, record in records.items()}
        replace_private(self.path, json.dumps(content, indent=2) + "\n")

    def write_environment(self, environment: dict[str, str]) -> None:
        """Leave the URM_* variables that lead other commands of this project to the services."""
        lines = [f'{name}="{value}"' for name, value in sorted(environment.items())]
        replace_private(self.env_path, "\n".join(lines) + "\n")

    def clear(self) -> None:
        """Forget all services."""
        self.path.unlink(missing_ok=True)
        self.env_path.unlink(missing_ok=True)


def replace_private(path: Path, text: str) -> None:
    """Write a file at once or not at all; only its owner may read it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    os.replace(temporary, path)
