"""Brings the services up, waits until they are ready, and takes them down."""

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from components.exceptions import UnavailableError
from components.local.airflow import POOL
from components.local.processes import find, ports_reserved, run_to_end, spawn, stop, tail
from components.local.registry import Registry, ServiceRecord
from components.local.services import Service, Stack, describe_stack
from components.settings import Settings

GRACE_SECONDS = 8.0
DAG_ID = "recall_training"
STOP_LAST = ("airflow-api", "redis", "mlflow")  # others write to them while they stop
_DAG_TIMEOUT_SECONDS = 90.0
_POLL_SECONDS = 0.3

Say = Callable[[str], None]


def up(settings: Settings, say: Say, config: str) -> Stack:
    """Start what does not run yet, wait for all of it, and prepare Airflow; what runs well is left alone.

    `say` is told what happens, in a few words; `config` names the configuration that recall worker and API serve by.

    Raises:
        UnavailableError: A service ends or does not get ready in time; the sentence names its log.
    """
    registry = Registry(settings.home.absolute())
    with registry.locked(), ports_reserved(say):
        return _up(settings, registry, say, config)


def _up(settings: Settings, registry: Registry, say: Say, config: str) -> Stack:
    home = settings.home.absolute()
    known = {name: record for name, record in registry.read().items() if find(record.process)}
    stack = describe_stack(settings, known, config)
    running = _drop_outdated(stack, known, say)
    registry.write(running)
    missing = [service for service in stack.services if service.name not in running]
    # Airflow's processes need its database; the others start beside that work.
    for service in sorted(missing, key=lambda service: service.name.startswith("airflow")):
        if service.name.startswith("airflow"):
            _prepare_airflow(stack, service, home, say)
        running[service.name] = _start(service, home, settings.configs_dir.absolute().parent)
        registry.write(running)
    registry.write_environment(stack.environment)
    for service in stack.services:
        _wait(service, running[service.name], say if service in missing else None)
    _wait_for_dag(stack)
    stack.airflow.ensure_pool(POOL, 1, "One heavy stage at a time on this machine.")
    return stack


def down(settings: Settings, say: Say) -> None:
    """Stop every service of the registry with its children: those that others write to, last."""
    registry = Registry(settings.home.absolute())
    with registry.locked():
        records = registry.read()
        live = [name for name, record in records.items() if find(record.process)]
        last = [name for name in live if name in STOP_LAST]
        for names in ([name for name in live if name not in last], last):
            if names:
                say(f"stopping {', '.join(names)}")
                stop([records[name].process for name in names], GRACE_SECONDS)
        registry.clear()


def _drop_outdated(stack: Stack, known: dict[str, ServiceRecord], say: Say) -> dict[str, ServiceRecord]:
    """Stop services that would be started otherwise now (another port, folder, program); return the rest."""
    wanted = {service.name: service.fingerprint for service in stack.services}
    outdated = {name: record for name, record in known.items() if wanted.get(name) != record.fingerprint}
    if outdated:
        say(f"restarting {', '.join(outdated)}: settings or code have changed")
        stop([record.process for record in outdated.values()], GRACE_SECONDS)
    return {name: record for name, record in known.items() if name not in outdated}


def _start(service: Service, home: Path, folder: Path) -> ServiceRecord:
    log = home / "logs" / f"{service.name}.log"
    process = spawn(service.command, environment=service.variables(), log=log, folder=folder)
    return ServiceRecord(process=process, port=service.port, url=service.url, log=log, fingerprint=service.fingerprint)


def _prepare_airflow(stack: Stack, service: Service, home: Path, say: Say) -> None:
    """Bring Airflow's database to the installed version, once per version."""
    stamp = home / "airflow" / "migrated"
    installed = version("apache-airflow")
    if stamp.exists() and stamp.read_text() == installed:
        return
    say("preparing Airflow's database (first start only)")
    log = home / "logs" / "airflow-migrate.log"
    exit_code = run_to_end(stack.migrate, environment=service.variables(), log=log, folder=home)
    if exit_code != 0:
        raise _not_ready("Airflow's database", "a finished migration", f"exit code {exit_code}", log)
    stamp.write_text(installed)


def _wait(service: Service, record: ServiceRecord, say: Say | None) -> None:
    """Return when the service is ready."""
    start = time.monotonic()
    while not service.is_ready():
        if find(record.process) is None:
            raise _not_ready(f"service {service.name}", "a process that stays", "its end", record.log)
        if time.monotonic() - start > service.timeout_seconds:
            waited = f"no sign of it within {service.timeout_seconds:.0f} s"
            raise _not_ready(f"service {service.name}", "it to be ready", waited, record.log)
        time.sleep(_POLL_SECONDS)
    if say:
        say(f"{service.name} is ready{' at ' + service.url if service.url else ''}")


def _wait_for_dag(stack: Stack) -> None:
    """Return when Airflow has read the DAG; a file that cannot be imported is an error at once."""
    deadline = time.monotonic() + _DAG_TIMEOUT_SECONDS
    while not stack.airflow.has_dag(DAG_ID):
        errors = stack.airflow.import_errors()
        if errors or time.monotonic() > deadline:
            raise UnavailableError(
                f"DAG {DAG_ID}",
                expected="Airflow to have read it",
                got="; ".join(errors) or f"nothing within {_DAG_TIMEOUT_SECONDS:.0f} s",
                remedy="fix the file, or look at the log of airflow-dag-processor",
            )
        time.sleep(_POLL_SECONDS)


def _not_ready(subject: str, expected: str, got: str, log: Path) -> UnavailableError:
    return UnavailableError(
        subject, expected=expected, got=got, remedy=f"its log {log} ends with:\n{tail(log)}\nfix that and run `urm up`"
    )
