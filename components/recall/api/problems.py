"""Errors of the API as problem documents (RFC 9457): one sentence with subject, expected, got, remedy."""

from __future__ import annotations

import re
from typing import Any

import redis
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from components.recall.telemetry.logs import name_error
from components.redis_client import is_unavailable

log = structlog.get_logger()
_PREFIX = re.compile("^(Value error, )?(expected |Input should (be |have )?)?")
_MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 2


class Problem(BaseModel):
    """Body of every error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "Not Found",
                    "status": 404,
                    "detail": "task 'gift': expected one of next_purchase, repurchase, got 'gift'; name a known task.",
                }
            ]
        }
    )

    type: str = Field(default="about:blank", description="Always about:blank; the status says the kind.")
    title: str = Field(description="The status in words.")
    status: int
    detail: str = Field(description="One sentence: subject, what was expected, what came, what to do.")


class ApiError(Exception):
    """An error that the caller gets as a problem document."""

    def __init__(
        self, status: int, subject: str, *, expected: str, got: object, remedy: str, retry_after: bool = False
    ) -> None:
        super().__init__(f"{subject}: expected {expected}, got {got}; {remedy}.")
        self.status = status
        self.retry_after = retry_after


TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the errors that a route gives."""
    schema = {_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": TITLES[status], "content": schema, "model": Problem} for status in statuses}


def install(app: FastAPI) -> None:
    """Make every error of the application a problem document."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return _respond(error.status, str(error), retry=error.retry_after)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _respond(422, _explain(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 413:
            return too_large(None)
        if error.status_code == 400:  # before anything is validated: bytes that are no text
            return _respond(400, "body: expected JSON in UTF-8, got something else; see /docs for an example.")
        detail = (
            f"request {request.method} {request.url.path}: expected a path and method of this API, "
            f"got {error.detail}; see /docs."
        )
        return _respond(error.status_code, detail)

    @app.exception_handler(redis.RedisError)
    async def on_redis_error(request: Request, error: redis.RedisError) -> JSONResponse:
        if not is_unavailable(error):
            raise error  # a bug, see below
        log.error("redis is unavailable", error=name_error(error))
        return _respond(
            503, "result store: expected Redis to serve, got no answer or a refusal; try again later.", retry=True
        )

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:  # the server logs it with its traceback
        return _respond(500, "server: expected no error here, got one that is now in its log; report it.")


def too_large(max_bytes: int | None) -> JSONResponse:
    """The answer to a body above the limit."""
    limit = f"at most {max_bytes} bytes" if max_bytes else "a shorter one"
    return _respond(413, f"body: expected {limit}, got more; send the events in several requests.")


def _respond(status: int, detail: str, retry: bool = False) -> JSONResponse:
    problem = Problem(title=TITLES.get(status, "Error"), status=status, detail=detail)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if retry else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.model_dump(), status_code=status, headers=headers, media_type=_MEDIA_TYPE)


def _explain(error: RequestValidationError) -> str:
    first = error.errors()[0]
    place, *path = first["loc"]
    # A body of events: the first part of its path says which form was taken to be meant, one event or a list.
    names = [str(part) for part in (path[1:] if path[:1] in (["event"], ["events"]) else path)]
    field = ".".join(names) or "body"
    message = _PREFIX.sub("", first["msg"]).rstrip(".")
    got = "nothing" if first["type"] == "missing" else repr(first.get("input"))
    if first["type"] == "extra_forbidden":
        message, got = "known fields only", "this one"
    elif first["type"] == "missing":
        message = "a value"
    elif first["type"] == "json_invalid":
        field, message, got = "body", "valid JSON", str(first.get("ctx", {}).get("error", "something else"))
    got = got if len(got) <= 80 else got[:79] + "…"
    return f"{place} field {field!r}: expected {message}, got {got}; see /docs for an example."
