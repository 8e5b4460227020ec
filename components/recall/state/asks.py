"""Ad-hoc requests between the API and the ad-hoc workers: a bounded list in Redis, and one answer for each.

A request whose deadline has passed is dropped unprocessed: nobody waits for it any more. Deadlines are counted by the
clock of Redis, so that clocks of machines may differ. This module is light; the API process loads it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import redis
import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from components.config import RecallConfig
from components.exceptions import UnavailableError
from components.recall.state.scripts import ASK, ASK_WORKERS, ASKS, ask_answer_key
from components.recall.telemetry.logs import name_error

log = structlog.get_logger()
WORKER_TTL_SECONDS = 10.0  # an ad-hoc worker that is silent for longer gets no requests


class Ask(BaseModel):
    """One ad-hoc request.

    Attributes:
        ask_id: Names the answer.
        user_id: Any user; one without a history is new.
        task: A task of the serving release.
        k: Items wanted.
        query: What the user searches for; for tasks that need it.
        guidance: What the recall should be steered to, in words.
    """

    model_config = ConfigDict(frozen=True)

    ask_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    user_id: str
    task: str
    k: int
    query: str | None = None
    guidance: str | None = None


class AskRefusal(BaseModel):
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


class AskResult(BaseModel):
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


AskAnswer = AskResult | AskRefusal
_ANSWER: TypeAdapter[AskAnswer] = TypeAdapter(AskAnswer)


def ask_arguments(ask: Ask, config: RecallConfig) -> dict[str, list[Any]]:
    """Keys and arguments of the script ASK."""
    return {
        "keys": [ASKS, ASK_WORKERS],
        "args": [ask.model_dump_json(), config.ad_hoc_queue, config.ad_hoc_deadline_seconds],
    }


def read_answer(outcome: int, popped: Any, config: RecallConfig) -> AskAnswer:
    """The answer from what Redis said: the outcome of the script ASK, and what BLPOP brought before the deadline."""
    if outcome == 1 and popped is not None:
        return _ANSWER.validate_json(popped[1])
    seconds = f"{config.ad_hoc_deadline_seconds:g} s"
    status, expected, got, remedy = {
        -1: (503, "an ad-hoc worker", "none", "start one with `urm recall worker --ad-hoc`, or read stored results"),
        0: (429, f"fewer than {config.ad_hoc_queue} requests that wait", "as many", "repeat the request later"),
        1: (504, f"an answer within {seconds}", "none", "repeat the request later, or start more ad-hoc workers"),
    }[outcome]
    return AskRefusal(status=status, subject="ad-hoc recall", expected=expected, got=got, remedy=remedy)


def ask_and_wait(client: redis.Redis, ask: Ask, config: RecallConfig) -> AskResult:
    """Ask and wait until the deadline; for callers that are no HTTP service.

    Raises:
        UnavailableError: There is no result.
    """
    arguments = ask_arguments(ask, config)
    outcome: Any = client.register_script(ASK)(keys=arguments["keys"], args=arguments["args"])
    # A socket may be silent for less than a deadline may be long, so the wait is cut into pieces.
    popped: Any = None
    if outcome == 1:
        pieces = math.ceil(config.ad_hoc_deadline_seconds / 5)
        for _ in range(pieces):
            popped = popped or client.blpop([ask_answer_key(ask.ask_id)], config.ad_hoc_deadline_seconds / pieces)
    answer = read_answer(int(outcome), popped, config)
    if isinstance(answer, AskRefusal):
        raise UnavailableError(answer.subject, **answer.parts)
    return answer


class AskDesk:
    """The ad-hoc requests as one ad-hoc worker sees them."""

    def __init__(self, client: redis.Redis, worker: str, config: RecallConfig) -> None:
        self._client = client
        self._worker = worker
        self._config = config

    def open(self) -> None:
        """Say that this worker answers; to be said again before `WORKER_TTL_SECONDS` are over."""
        now = self._now()
        with self._client.pipeline(transaction=False) as pipe:
            pipe.zremrangebyscore(ASK_WORKERS, "-inf", now)
            pipe.zadd(ASK_WORKERS, {self._worker: now + WORKER_TTL_SECONDS})
            pipe.execute()

    def close(self) -> None:
        """Say that it does no more."""
        self._client.zrem(ASK_WORKERS, self._worker)

    def take(self, count: int, block_seconds: float) -> tuple[list[Ask], int]:
        """Requests that still have time, at most `count`, and the number of those dropped because they have none."""
        first: Any = self._client.blpop([ASKS], block_seconds)
        if first is None:
            return [], 0
        rest: Any = self._client.lpop(ASKS, count - 1) if count > 1 else None
        now = self._now()
        asks, dropped = [], 0
        for text in [first[1], *(rest or [])]:
            deadline, _, body = text.partition(" ")
            try:
                if float(deadline) > now:
                    asks.append(Ask.model_validate_json(body))
                else:
                    dropped += 1
            except (ValidationError, ValueError) as error:  # of another version of this software
                log.error("ad-hoc request cannot be read", error=name_error(error))
                dropped += 1
        return asks, dropped

    def answer(self, answers: Mapping[str, AskAnswer]) -> None:
        """Leave answers by the ids of their requests; gone after the longest wait."""
        with self._client.pipeline(transaction=True) as pipe:
            for ask_id, answer in answers.items():
                pipe.rpush(ask_answer_key(ask_id), answer.model_dump_json())
                pipe.expire(ask_answer_key(ask_id), math.ceil(self._config.ad_hoc_deadline_seconds))
            pipe.execute()

    def _now(self) -> float:
        time: Any = self._client.time()
        return float(time[0] + time[1] / 1e6)
