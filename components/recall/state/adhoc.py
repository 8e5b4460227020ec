"""Ad-hoc requests between the API and the ad-hoc workers: a bounded list in Redis, and one answer for each.

A request whose deadline has passed is dropped unprocessed, since its caller has gone. Deadlines follow the clock of
Redis, so clocks of machines may differ. This module is light; the API process loads it.
"""

import math
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import redis
import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from components.config import RecallConfig
from components.exceptions import ConfigError, UnavailableError
from components.recall.state.scripts import AD_HOC_REQUESTS, AD_HOC_WORKERS, ENQUEUE, ad_hoc_answer_key
from components.recall.telemetry.logs import name_error
from components.release.publication import HEARTBEAT_TTL_SECONDS

log = structlog.get_logger()


class AdHocRequest(BaseModel):
    """One ad-hoc request.

    Attributes:
        request_id: Names the answer.
        user_id: Any user; one without a history is new.
        task: A task of the serving release.
        k: Items wanted.
        query: What the user searches for; for tasks that need it.
        guidance: What the recall should be steered to, in words.
    """

    model_config = ConfigDict(frozen=True)

    request_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    user_id: str
    task: str
    k: int
    query: str | None = None
    guidance: str | None = None


class AdHocRefusal(BaseModel):
    """Why there is no result: the parts of one sentence, and the status that an HTTP answer has."""

    status: int
    subject: str
    expected: str
    got: str
    remedy: str

    @property
    def parts(self) -> dict[str, str]:
        """Arguments of an error beside its subject."""
        return {"expected": self.expected, "got": self.got, "remedy": self.remedy}


class AdHocResult(BaseModel):
    """What the model recalls for a request.

    Attributes:
        item_ids: Best first.
        scores: Parallel to item_ids.
        release: Release that computed it.
        event_id: The user's newest live event, if there is one.
        event_ts: When that happened.
        computed_at: When the result was computed.
    """

    item_ids: list[int]
    scores: list[float]
    release: str
    event_id: str | None
    event_ts: datetime | None
    computed_at: datetime


AdHocOutcome = AdHocResult | AdHocRefusal
_ANSWER: TypeAdapter[AdHocOutcome] = TypeAdapter(AdHocOutcome)


def enqueue_arguments(request: AdHocRequest, config: RecallConfig) -> dict[str, list[Any]]:
    """Keys and arguments of the script ENQUEUE."""
    return {
        "keys": [AD_HOC_REQUESTS, AD_HOC_WORKERS],
        "args": [request.model_dump_json(), config.ad_hoc_queue, config.ad_hoc_deadline_seconds],
    }


def read_answer(outcome: int, popped: Any, config: RecallConfig) -> AdHocOutcome:
    """The answer, from the outcome of the script ENQUEUE and what BLPOP returned before the deadline."""
    if outcome == 1 and popped is not None:
        return _ANSWER.validate_json(popped[1])
    seconds = f"{config.ad_hoc_deadline_seconds:g} s"
    status, expected, got, remedy = {
        -1: (503, "an ad-hoc worker", "none", "start one with `urm recall worker --ad-hoc`, or read stored results"),
        0: (429, f"fewer than {config.ad_hoc_queue} requests that wait", "as many", "repeat the request later"),
        1: (504, f"an answer within {seconds}", "none", "repeat the request later, or start more ad-hoc workers"),
    }[outcome]
    return AdHocRefusal(status=status, subject="ad-hoc recall", expected=expected, got=got, remedy=remedy)


def request_and_wait(client: redis.Redis, request: AdHocRequest, config: RecallConfig) -> AdHocResult:
    """Send a request and wait for its answer until the deadline; for callers other than the API.

    Raises:
        ConfigError: The request is wrong: an unknown task, no query where one is needed.
        UnavailableError: There is no result.
    """
    arguments = enqueue_arguments(request, config)
    outcome: Any = client.register_script(ENQUEUE)(keys=arguments["keys"], args=arguments["args"])
    # The socket times out before the longest deadline, so the wait is cut into pieces.
    popped: Any = None
    if outcome == 1:
        pieces = math.ceil(config.ad_hoc_deadline_seconds / 5)
        for _ in range(pieces):
            popped = popped or client.blpop(
                [ad_hoc_answer_key(request.request_id)], config.ad_hoc_deadline_seconds / pieces
            )
    answer = read_answer(int(outcome), popped, config)
    if isinstance(answer, AdHocRefusal):
        raise (ConfigError if answer.status == 422 else UnavailableError)(answer.subject, **answer.parts)
    return answer


class AdHocQueue:
    """The queue of ad-hoc requests, as one ad-hoc worker sees it."""

    def __init__(self, client: redis.Redis, worker: str, config: RecallConfig) -> None:
        self._client = client
        self._worker = worker
        self._config = config
        self._taken: dict[str, str] = {}

    def register(self) -> None:
        """Register this worker until its heartbeat would be gone, too; to be repeated between batches."""
        now = self._now()
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zremrangebyscore(AD_HOC_WORKERS, "-inf", now)
            pipe.zadd(AD_HOC_WORKERS, {self._worker: now + HEARTBEAT_TTL_SECONDS})
            pipe.execute()

    def unregister(self) -> None:
        """Unregister this worker."""
        self._client.zrem(AD_HOC_WORKERS, self._worker)

    def take(self, count: int, block_seconds: float) -> tuple[list[AdHocRequest], int]:
        """Requests that still have time, at most `count`, and the number of those dropped because they have none."""
        first: Any = self._client.blpop([AD_HOC_REQUESTS], block_seconds)
        if first is None:
            return [], 0
        rest: Any = self._client.lpop(AD_HOC_REQUESTS, count - 1) if count > 1 else None
        now = self._now()
        requests, dropped, self._taken = [], 0, {}
        for text in [first[1], *(rest or [])]:
            deadline, _, body = text.partition(" ")
            try:
                if float(deadline) > now:
                    requests.append(AdHocRequest.model_validate_json(body))
                    self._taken[requests[-1].request_id] = text
                else:
                    dropped += 1
            except (ValidationError, ValueError) as error:  # of another version of this software
                log.error("ad-hoc request cannot be read", error=name_error(error))
                dropped += 1
        return requests, dropped

    def hand_back(self) -> None:
        """Leave what was taken and not answered to other workers, first in the queue."""
        if self._taken:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.lpush(AD_HOC_REQUESTS, *reversed(self._taken.values()))
                pipe.expire(AD_HOC_REQUESTS, math.ceil(self._config.ad_hoc_deadline_seconds))
                pipe.execute()

    def answer(self, answers: Mapping[str, AdHocOutcome]) -> None:
        """Leave answers by the ids of their requests; gone after the longest wait."""
        with self._client.pipeline(transaction=True) as pipe:
            for request_id, answer in answers.items():
                pipe.rpush(ad_hoc_answer_key(request_id), answer.model_dump_json())
                pipe.expire(ad_hoc_answer_key(request_id), math.ceil(self._config.ad_hoc_deadline_seconds))
            pipe.execute()
        for request_id in answers:
            self._taken.pop(request_id, None)

    def _now(self) -> float:
        time: Any = self._client.time()
        return float(time[0] + time[1] / 1e6)
