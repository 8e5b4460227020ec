"""Errors of the API as problem documents (RFC 9457): a type that programs tell apart, one sentence for people."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import redis
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from components.recall.api.problem_types import CODES, MAX_FAULTS, TYPE, Fault, Problem
from components.recall.api.responses import EventOutcome
from components.recall.telemetry.logs import name_error
from components.redis_client import is_demoted, is_unavailable

log = structlog.get_logger()
_PREFIX = re.compile("^(Value error, )?(expected |Input should (be |have )?)?")
REQUEST_ID = "X-Request-Id"
_MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2
# The requests of a minute fade over the minute after it: the five pauses of a client outlast both.
RATE_RETRY_AFTER_SECONDS = 30
_AD_HOC = {422: "invalid-request", 429: "ad-hoc-queue-full", 503: "no-ad-hoc-worker", 504: "ad-hoc-timeout"}


class ApiError(Exception):
    """An error that the caller gets as a problem document."""

    def __init__(
        self, code: str, subject: str, *, expected: str, got: object, remedy: str, errors: Sequence[Fault] = ()
    ) -> None:
        super().__init__(f"{subject}: expected {expected}, got {got}; {remedy}.")
        self.code = code
        self.status = CODES[code]
        self.type = TYPE + code
        self.errors = errors
        self.events: Sequence[EventOutcome] = ()

    @classmethod
    def of_faults(cls, faults: Sequence[Fault]) -> ApiError:
        """Of an invalid request."""
        first = faults[0]
        expected, _, got = first.detail.removeprefix("expected ").rpartition(", got ")
        subject, remedy = f"{first.place} field {first.field!r}", "see /docs for an example"
        return cls("invalid-request", subject, expected=expected, got=got, remedy=remedy, errors=faults)


def ad_hoc_code(status: int) -> str:
    """The kind of problem that an ad-hoc refusal of this status is."""
    return _AD_HOC.get(status, "server-error")


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the errors that a route gives."""
    schema = {_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    kinds = {status: ", ".join(code for code in CODES if CODES[code] == status) for status in statuses}
    return {status: {"description": kinds[status], "content": schema, "model": Problem} for status in statuses}


def install(app: FastAPI, reconnect: Callable[[], Awaitable[None]]) -> None:
    """Make every error of the application a problem document; after a fail-over, Redis is connected to anew."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(ApiError.of_faults(explain(error.errors())))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 413:
            return too_large(None)
        if error.status_code == 400:  # before anything is validated: bytes that are no text
            return _respond("not-json", "body: expected JSON in UTF-8, got something else; see /docs for an example.")
        detail = (
            f"request {request.method} {request.url.path}: expected a path and method of this API, "
            f"got {error.detail}; see /docs."
        )
        code = "wrong-method" if error.status_code == 405 else "unknown-path"
        return _respond(code, detail, headers=error.headers)

    @app.exception_handler(redis.RedisError)
    async def on_redis_error(request: Request, error: redis.RedisError) -> JSONResponse:
        if not is_unavailable(error):
            raise error  # a bug, see below
        log.error("redis is unavailable", error=name_error(error))
        if is_demoted(error):
            await reconnect()
        detail = "result store: expected Redis to serve, got no answer or a refusal; try again later."
        return _respond("redis-unavailable", detail)

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:  # the server logs it with its traceback
        detail = "server: expected no error here, got one that is now in its log; report it."
        # This answer is Starlette's own, outside what gives the others their headers.
        known = str(structlog.contextvars.get_contextvars().get("request_id", ""))
        return _respond("server-error", detail, headers={REQUEST_ID: known, "Cache-Control": "no-store"})


def answer(error: ApiError) -> JSONResponse:
    """The problem document of an error."""
    return _respond(error.code, str(error), error.errors, events=error.events)


def too_large(max_bytes: int | None) -> JSONResponse:
    """The answer to a body above the limit."""
    limit = f"at most {max_bytes} bytes" if max_bytes else "a shorter one"
    return _respond("body-too-large", f"body: expected {limit}, got more; send the events in several requests.")


def explain(errors: Sequence[Any]) -> list[Fault]:
    """What pydantic found wrong with a request."""
    return [_explain(error) for error in errors[:MAX_FAULTS]]


def _respond(
    code: str,
    detail: str,
    faults: Sequence[Fault] = (),
    headers: Mapping[str, str] | None = None,
    events: Sequence[EventOutcome] = (),
) -> JSONResponse:
    status = CODES[code]
    title = code.replace("-", " ").capitalize()
    problem = Problem(
        type=TYPE + code, title=title, status=status, detail=detail, errors=list(faults), events=list(events)
    )
    sent = dict(headers or {})
    if status in (429, 503):
        sent["Retry-After"] = str(RATE_RETRY_AFTER_SECONDS if code == "rate-limited" else RETRY_AFTER_SECONDS)
    if status == 401:
        sent["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.model_dump(), status_code=status, headers=sent, media_type=_MEDIA_TYPE)


def _explain(error: Mapping[str, Any]) -> Fault:
    place, *path = error["loc"]
    # A body of events: the first part of its path says which form was taken to be meant, one event or a list.
    names = [str(part) for part in (path[1:] if path[:1] in (["event"], ["events"]) else path)]
    field = _shorten(".".join(names)) or "body"  # a client may make up names of any length
    message = _PREFIX.sub("", error["msg"]).rstrip(".")
    got = "nothing" if error["type"] == "missing" else repr(error.get("input"))
    if isinstance(error.get("input"), bytes):  # FastAPI reads a body as JSON only where its header says so
        message, got = "JSON, with content-type application/json", "another content-type or none"
    elif error["type"] == "extra_forbidden":
        message, got = "known fields only", "this one"
    elif error["type"] == "missing":
        message = "a value"
    elif error["type"] == "json_invalid":
        field, message, got = "body", "valid JSON", str(error.get("ctx", {}).get("error", "something else"))
    return Fault(place=str(place), field=field, detail=f"expected {message}, got {_shorten(got)}")


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
