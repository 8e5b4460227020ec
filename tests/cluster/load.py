"""Reads and events on the API's pods as a Service would spread them, and what became of them."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Self

import httpx

from components.client import Event, RecallClient
from tests.cluster.world import API, Service
from tests.worlds.tiny import ITEM_IDS, NUM_USERS

READS_PER_SECOND, EVENTS_PER_SECOND = 200, 4
USERS = [str(user) for user in range(NUM_USERS)]
_THREADS = 8


class Addresses:
    """The addresses that the Service's slices call ready; a proxy follows them in the same way."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ready: list[str] = []
        self._turn = 0
        self.look()

    def look(self) -> None:
        """Read the slices."""
        found = self._service.kubectl.read("endpointslices", "--selector", f"kubernetes.io/service-name={API}")
        endpoints = [endpoint for one in found["items"] for endpoint in one.get("endpoints") or []]
        ready = [address for one in endpoints if one["conditions"].get("ready") for address in one["addresses"]]
        self._ready = ready or self._ready

    def next(self) -> str:
        """One of them, in turn."""
        self._turn += 1
        return f"http://{self._ready[self._turn % len(self._ready)]}:8000"


class Load:
    """Reads and events, and what became of them.

    Attributes:
        outcomes: Reads by outcome: `model`, `fallback`, a status or an error's name.
        went_back: Reads that knew less than an earlier read of the same user.
        sent: Events.
        refused: Those that were not taken.
        releases: Releases that answered reads, in the order of their first answer.
    """

    def __init__(self, service: Service, reads_per_second: float) -> None:
        self.outcomes: Counter[str] = Counter()
        self.went_back: list[str] = []
        self.sent = self.refused = 0
        self.releases: list[str] = []
        self._addresses, self._rate = Addresses(service), reads_per_second
        self._token = service.environment["URM_API_TOKEN"]
        self._newest: dict[str, Event] = {}
        self._seen: dict[str, datetime] = {}
        self._stop, self._lock = threading.Event(), threading.Lock()

    @property
    def failed(self) -> dict[str, int]:
        """Reads without an answer."""
        return {what: count for what, count in self.outcomes.items() if what not in ("model", "fallback")}

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Read and send while the body runs."""
        with ThreadPoolExecutor(_THREADS + 2) as pool:
            futures = [pool.submit(self._read, number) for number in range(_THREADS)]
            futures += [pool.submit(self._send), pool.submit(self._follow)]
            try:
                yield self
            finally:
                self._stop.set()
            for future in futures:
                future.result()

    def require_visible(self, seconds: float = 60) -> None:
        """Wait until the newest event of every user is in a result."""
        deadline = time.monotonic() + seconds
        with RecallClient(self._addresses.next(), self._token) as api:
            for user, event in self._newest.items():
                while api.recall(user).event_id != event.event_id:
                    assert time.monotonic() < deadline, f"event {event.event_id} of user {user} is not visible"
                    time.sleep(0.2)

    def _read(self, number: int) -> None:
        due = time.monotonic() + number / self._rate
        with httpx.Client(headers={"Authorization": f"Bearer {self._token}"}, timeout=5) as client:
            while not self._stop.is_set():
                time.sleep(max(0.0, due - time.monotonic()))
                due, number = due + _THREADS / self._rate, number + _THREADS
                user = USERS[number % len(USERS)]
                before = self._seen.get(user)
                try:
                    answer = client.get(f"{self._addresses.next()}/v1/users/{user}/recall")
                except httpx.HTTPError as error:
                    self._count(type(error).__name__)
                    continue
                if answer.status_code == 200:
                    self._judge(user, before, answer.json())
                else:
                    self._count(str(answer.status_code))

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1

    def _judge(self, user: str, before: datetime | None, body: dict[str, Any]) -> None:
        """Take an answer down; `before` is what a read of the user knew before this one was asked."""
        self._count(body["source"])
        with self._lock:
            if body["release"] not in self.releases:
                self.releases.append(body["release"])
            knows = datetime.fromisoformat(body["event_ts"]) if body["event_ts"] else None
            if before is not None and (knows is None or knows < before):
                self.went_back.append(f"user {user}: {knows} after {before}")
            if knows is not None:
                self._seen[user] = max(knows, self._seen.get(user, knows))

    def _send(self) -> None:
        while not self._stop.wait(1 / EVENTS_PER_SECOND):
            event = Event(user_id=USERS[self.sent % NUM_USERS], item_id=int(ITEM_IDS[self.sent % len(ITEM_IDS)]))
            with RecallClient(self._addresses.next(), self._token) as api:
                self.refused += api.send([event]).events[0].status != "accepted"
            self.sent += 1
            self._newest[event.user_id] = event

    def _follow(self) -> None:
        while not self._stop.wait(0.5):
            self._addresses.look()


@contextmanager
def load(service: Service, reads_per_second: float = READS_PER_SECOND) -> Iterator[Load]:
    """Read and send while the body runs; then wait until every event is visible."""
    with Load(service, reads_per_second).running() as found:
        yield found
    found.require_visible()
