"""The lock of promotions on a cluster: a Lease, held by name, renewed beside the work, taken over once it is silent.

Whether a holder is silent is measured by the waiter's own clock, from when it last saw the Lease change; so the clocks
of machines may differ. That alone keeps nobody from writing late: every write of a promotion also asks for the
version of the object that it has read (`components/deploy/kubernetes.py`).
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import structlog

from components.deploy.cluster import Cluster, ConflictError, Object
from components.deploy.target import overtaken
from components.exceptions import UnavailableError, UrmError

log = structlog.get_logger()

NAME = "urm-promotion"
DURATION_SECONDS = 30.0  # silence after which the next promotion takes over
_POLL_SECONDS = 0.5


class Lease:
    """The Lease as one promotion sees it."""

    def __init__(self, cluster: Cluster, duration_seconds: float = DURATION_SECONDS) -> None:
        self._cluster = cluster
        self._duration = duration_seconds
        self.holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    @contextmanager
    def hold(self, timeout_seconds: float) -> Iterator[None]:
        """Take the Lease, renew it meanwhile, give it back.

        Raises:
            UnavailableError: Another promotion does not end in time, or the API does not answer.
        """
        self._acquire(timeout_seconds)
        ended = threading.Event()
        renewing = threading.Thread(target=self._renew, args=[ended], name="lease", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
            with suppress(UrmError, ConflictError):  # lost already, or it expires by itself
                lease = self._cluster.read_lease(NAME)
                if _holder(lease) == self.holder:
                    self._write(lease, "")

    def require(self) -> None:
        """Refuse to go on without the Lease.

        Raises:
            ReleaseError: Another promotion has taken over.
            UnavailableError: The API does not answer.
        """
        if _holder(self._cluster.read_lease(NAME)) != self.holder:
            raise overtaken(f"Lease {NAME}")

    def _acquire(self, timeout_seconds: float) -> None:
        seen, since, lives = "", 0.0, False
        deadline = time.monotonic() + timeout_seconds
        while True:
            lease = self._cluster.read_lease(NAME)
            holder = _holder(lease)
            if lease["metadata"]["resourceVersion"] != seen:
                lives = bool(seen)
                seen, since = lease["metadata"]["resourceVersion"], time.monotonic()
            limit = _spec(lease).get("leaseDurationSeconds") or self._duration
            silent = time.monotonic() - since >= limit
            if not holder or silent:
                with suppress(ConflictError):  # another was faster
                    self._write(lease, self.holder)
                    if holder:
                        log.warning("a promotion stood still or was killed, and is taken over", holder=holder)
                    return
            if lives and time.monotonic() > deadline:  # else it is found out first whether it was killed
                raise UnavailableError(
                    "promotion",
                    expected=f"the one in progress to end within {timeout_seconds:g} s",
                    got=f"one that goes on, {holder}",
                    remedy="wait for it and try again",
                )
            time.sleep(_POLL_SECONDS)

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(self._duration / 3):
            try:
                lease = self._cluster.read_lease(NAME)
                if _holder(lease) != self.holder:
                    return  # the next step of the promotion finds out
                self._write(lease, self.holder)
            except (UrmError, ConflictError) as error:
                log.warning("the Lease of the promotion could not be renewed", error=str(error))

    def _write(self, lease: Object, holder: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # MicroTime: always six digits
        spec = dict(_spec(lease))
        if _holder(lease) != holder:
            spec |= {"acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        spec |= {"holderIdentity": holder, "renewTime": now, "leaseDurationSeconds": max(1, round(self._duration))}
        self._cluster.replace_lease(NAME, {**lease, "spec": spec})


def _spec(lease: Object) -> Object:
    return lease.get("spec") or {}  # the manifests leave it empty


def _holder(lease: Object) -> str:
    return str(_spec(lease).get("holderIdentity") or "")
