"""What happens around every request of the API: an id, a size limit, a log line, a time, and who may ask."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated

import structlog
from fastapi import FastAPI, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.recall.api.problems import ApiError, too_large
from components.recall.api.tokens import Scope as Allowed
from components.recall.api.tokens import Token, Tokens
from components.recall.telemetry.metrics import ApiMetrics

log = structlog.get_logger()
MAX_BODY_BYTES = 4 * 2**20  # a thousand events of usual size are a tenth of it
REQUEST_ID = "X-Request-Id"
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_bearer = HTTPBearer(auto_error=False, description="Needed where the API was started with a token file.")


def install(app: FastAPI, metrics: ApiMetrics) -> None:
    """Give every request an id, a time and a log line; refuse bodies that are too large."""
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(Watch, metrics=metrics)


class Watch:
    """Gives every request an id, a time and a log line.

    Plain ASGI: Starlette's `middleware("http")` runs each request in a task of its own, which costs a read as much as
    the rest of it.
    """

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        """Wrap an application."""
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and take down what became of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 500  # of an error that nobody has made an answer of

        async def name(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers.setdefault("Cache-Control", "no-store")  # answers are of one user and one moment
            await send(message)

        try:
            await self._app(scope, receive, name)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's template, not the path: that names a user.
        route = getattr(scope.get("route"), "path_format", "unmatched")
        self._metrics.requests.labels(route=route, status=str(status)).observe(seconds)
        write = log.warning if status >= 500 else log.debug
        write(
            "request",
            method=scope["method"],
            route=route,
            status=status,
            seconds=round(seconds, 5),
            token=scope.get("state", {}).get("token"),
        )


class Gate:
    """Who may ask, and how often."""

    def __init__(self, tokens: Tokens | None, requests_per_minute: int) -> None:
        """Take the tokens, none where anybody may ask, and a rate for each of them; 0 for no limit."""
        self._tokens = tokens
        self._rate = RateLimitItemPerMinute(requests_per_minute) if requests_per_minute else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def allow(self, scope: Allowed) -> Callable[..., Awaitable[None]]:
        """A dependency that refuses requests without a token of this scope, and those beyond the rate."""

        async def check(
            request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
        ) -> None:
            caller = f"address {request.client.host if request.client else ''}"
            token = self._tokens.find(credentials.credentials) if self._tokens and credentials else None
            if token is not None:
                request.state.token = token.name
                caller = f"token {token.name}"
            self._count(caller)  # before anything is refused: who tries tokens is slowed down as well
            if self._tokens is not None:
                _require_scope(token, credentials, scope)

        return check

    def _count(self, caller: str) -> None:
        if self._rate is not None and not self._limiter.hit(self._rate, caller):
            raise ApiError(
                "rate-limited",
                "requests",
                expected=f"at most {self._rate.amount} a minute",
                got="more",
                remedy="repeat the request after the time in Retry-After",
            )


def _require_scope(token: Token | None, credentials: HTTPAuthorizationCredentials | None, scope: Allowed) -> None:
    if token is None:
        raise ApiError(
            "no-token",
            "header 'Authorization'",
            expected="Bearer and a token of this API",
            got="an unknown token" if credentials else "none",
            remedy="ask its operator for one (`urm recall token create`)",
        )
    if scope not in token.scopes:
        raise ApiError(
            "missing-scope",
            f"token {token.name!r}",
            expected=f"the scope {scope}",
            got=", ".join(token.scopes),
            remedy="use another token",
        )


class BodyLimit:
    """Refuses requests with a body above a limit, whether or not they announce its length."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Wrap an application."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await too_large(self._max_bytes)(scope, receive, send)
            return
        taken = 0

        async def count() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_bytes:
                raise HTTPException(413)
            return message

        await self._app(scope, count, send)
