"""A runtime under test: a real Redis, a real API, real workers, a sender, and a reader that never stops asking."""

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis

from components.recall.state.events import Event
from components.recall.state.scripts import GROUP, STREAM, accepted_key
from components.release.publication import WORKER_PREFIX, name_worker, publish, unregister
from tests.faults.checker import ALWAYS_ANSWERED, Checker, Report
from tests.faults.injection import Fault
from tests.faults.zygote import Zygote
from tests.worlds.recall import Release, wait_until
from tests.worlds.servers import RedisServer, free_port
from tests.worlds.tiny import ITEM_IDS, LAST_EVENT

# The runtime's own settings, small, so that a batch has several users and the dead are missed soon.
_RECALL = {"k": 10, "batch_size": 4, "max_wait_ms": 5, "claim_idle_seconds": 1.0, "history_events": 1000}
_EVENTS_PER_REQUEST = 20


@dataclass
class Worker:
    """A worker process."""

    pid: int
    name: str

    @property
    def status(self) -> str:
        """As psutil says it: a dead one is a zombie until it is buried."""
        return str(psutil.Process(self.pid).status())


class World:
    """All processes of one run; close it."""

    def __init__(
        self,
        server: RedisServer,
        release: Release,
        zygote: Zygote,
        folder: Path,
        api_fault: Fault | None = None,
        **recall: Any,
    ) -> None:
        self.server = server
        self.release = release
        self.client = redis.Redis.from_url(server.url, decode_responses=True)
        self.client.flushall()
        self.checker = Checker(self.client)
        self._zygote = zygote
        self._folder = folder
        self._options = [
            part for name, value in (_RECALL | recall).items() for part in ("--set", f"recall.{name}={value}")
        ]
        self._pids: set[int] = set()
        self._numbers = itertools.count()
        publish(self.client, release.name, str(release.bundle))
        port = free_port()
        self._start("serve", "--port", str(port), fault=api_fault)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
        wait_until(self._api_answers)

    def close(self) -> None:
        for pid in list(self._pids):
            os.kill(pid, signal.SIGKILL)
            self.wait(pid)
        self.http.close()
        self.client.close()

    def start_worker(self, fault: Fault | None = None, wait: bool = True) -> Worker:
        """A worker; without `wait`, it may not serve yet."""
        pid = self._start("worker", fault=fault)
        worker = Worker(pid, name_worker(pid))
        if wait:
            # Its heartbeat says its release, and nothing while it has none; its fault may strike before the first.
            wait_until(
                lambda: self.client.get(WORKER_PREFIX + worker.name) or worker.status == psutil.STATUS_ZOMBIE,
                seconds=90,
            )
        return worker

    def kill(self, worker: Worker) -> int:
        """SIGKILL; the number of entries that it leaves unfinished, all to be delivered again."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        return self.bury(worker)

    def bury(self, worker: Worker) -> int:
        """Wait for a dying worker; the number of entries that it leaves unfinished."""
        self.wait(worker.pid)
        unregister(self.client, worker.name)  # instead of waiting until its heartbeat expires
        return self.count_pending(worker)

    def count_pending(self, worker: Worker) -> int:
        """Entries that a worker has and has not finished."""
        rows: Any = self.client.xpending_range(STREAM, GROUP, "-", "+", 100_000, consumername=worker.name)
        return len(rows)

    def wait(self, pid: int) -> int:
        """Exit code of a process that ends."""
        self._pids.discard(pid)
        return self._zygote.wait(pid)

    def send(self, events: Sequence[Event]) -> None:
        """Post events until each is accepted, as a patient client does; one that is refused for good stays out."""
        for start in range(0, len(events), _EVENTS_PER_REQUEST):
            batch = list(events[start : start + _EVENTS_PER_REQUEST])
            self.checker.note_sent(batch)
            while not self._post(batch):
                time.sleep(0.1)

    def read(self, user_id: str, task: str) -> None:
        """Read as a client does, and the numbers in Redis before and after."""
        self.checker.read_stored(user_id, task)
        try:
            answer = self.http.get(f"/v1/users/{user_id}/recall", params={"task": task})
        except httpx.TimeoutException:
            return
        if answer.status_code != 503:  # Redis may be down
            answer.raise_for_status()
            self.checker.note_answer(answer.json())
            self.checker.read_stored(user_id, task)

    def reading(self, users: Sequence[str], seed: int) -> contextlib.AbstractContextManager[None]:
        """Read results of these users all the time."""
        chance = random.Random(seed)

        def read() -> None:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                self.read(chance.choice(users), chance.choice(ALWAYS_ANSWERED))

        return _repeating(read, pause=0.003)

    def sending(self, users: Sequence[str], seed: int) -> contextlib.AbstractContextManager[None]:
        """Send events of these users all the time, some of them twice."""
        chance = random.Random(seed)

        def send() -> None:
            events = self.make_events(users, 8, chance)
            self.send(events + chance.sample(events, 2))

        return _repeating(send, pause=0.02)

    def settle(self, seconds: float = 90) -> Report:
        """Wait until nothing is left to do, and judge."""
        wait_until(self.checker.settled, seconds)
        for user_id, task in itertools.product(sorted(self.checker.users), ALWAYS_ANSWERED):
            self.read(user_id, task)
        return self.checker.check()

    def make_events(self, users: Sequence[str], count: int, chance: random.Random, **fields: Any) -> list[Event]:
        """Events in no order of time, so that many are late; ids are unique in this world."""
        return [
            Event(
                event_id=f"e{next(self._numbers)}",
                user_id=chance.choice(users),
                item_id=int(chance.choice(ITEM_IDS)),
                ts=LAST_EVENT + timedelta(seconds=chance.randrange(1, 86_400)),
                **fields,
            )
            for _ in range(count)
        ]

    def lost(self) -> list[str]:
        """Accepted events whose mark is gone: Redis has lost them, for a mark lasts a day."""
        marks = {event.event_id: accepted_key(event.user_id, event.event_id) for event in self.checker.accepted}
        return [event_id for event_id, mark in marks.items() if not self.client.exists(mark)]

    def _start(self, *arguments: str, fault: Fault | None = None) -> int:
        environment = {"URM_HOME": str(self.release.settings.home), "URM_REDIS_URL": self.server.url}
        log = self._folder / f"{arguments[0]}.log"
        pid = self._zygote.start(["recall", *arguments, *self._options], environment, log, fault)
        self._pids.add(pid)
        return pid

    def _api_answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/healthz").status_code == 200
        return False

    def _post(self, batch: list[Event]) -> bool:
        """Whether the client is done with a batch."""
        try:
            answer = self.http.post("/v1/events", json=[event.model_dump(mode="json") for event in batch])
        except httpx.TimeoutException:
            return False
        if answer.status_code in (202, 207):
            rows = answer.json()["events"]
            taken = [row["status"] != "refused" for row in rows]
            self.checker.note_accepted([event for event, took in zip(batch, taken, strict=True) if took])
            if any(str(row["type"]).endswith("stream-full") for row in rows):
                return False
            self.checker.note_refused([event for event, took in zip(batch, taken, strict=True) if not took])
        elif answer.status_code == 422:
            self.checker.note_refused(batch)
        elif answer.status_code not in (429, 503):
            answer.raise_for_status()
        return answer.status_code in (202, 207, 422)


@contextlib.contextmanager
def _repeating(action: Callable[[], None], pause: float) -> Iterator[None]:
    """Do something again and again in a thread; what it raises is raised here at the end."""
    ended, errors = threading.Event(), []

    def repeat() -> None:
        while not ended.wait(pause) and not errors:
            try:
                action()
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=120)
    assert not thread.is_alive()
    if errors:
        raise errors[0]
