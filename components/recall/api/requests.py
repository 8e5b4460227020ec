"""What happens around every request of the API: an id, a size limit, a log line, a time, and who may ask."""

import re
import time
import uuid
from typing import Annotated, Any

import structlog
from fastapi import FastAPI, Request, Security
from fastapi.security import HTTPBearer
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.recall.api.problems import ApiError, answer, too_large
from components.recall.api.tokens import Scope as Allowed
from components.recall.api.tokens import Token, Tokens
from components.recall.telemetry.metrics import ApiMetrics

log = structlog.get_logger()
MAX_BODY_BYTES = 4 * 2**20  # a thousand events of usual size are a tenth of it
REQUEST_ID = "X-Request-Id"
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
bearer = HTTPBearer(auto_error=False, description="Needed where the API was started with a token file.")


# What a request under /v1/ needs, where it is not the scope `read`.
_SCOPES = {("POST", "/v1/events"): Allowed.WRITE, ("POST", "/v1/recall"): Allowed.ASK}


def install(app: FastAPI, metrics: ApiMetrics, tokens: Tokens | None) -> None:
    """Give every request an id, a time and a log line; refuse strangers, and bodies that are too large."""
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(Guard, tokens=tokens)
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


class Guard:
    """Refuses requests under /v1/ without a token of the scope that they need, before their body is read."""

    def __init__(self, app: ASGIApp, tokens: Tokens | None) -> None:
        """Wrap an application; without tokens anybody may ask."""
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401 or 403."""
        if self._tokens is not None and scope["type"] == "http" and scope["path"].startswith("/v1/"):
            kind, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
            token = self._tokens.find(secret.strip()) if kind.lower() == "bearer" else None
            try:
                _require_scope(token, kind, _SCOPES.get((scope["method"], scope["path"]), Allowed.READ))
            except ApiError as error:
                await answer(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["token"] = token.name if token else None
        await self._app(scope, receive, send)


class RateLimit:
    """How many requests and events one caller may send to all API processes together, counted in Redis."""

    def __init__(self, connections: Any, per_minute: int) -> None:
        """Take the pool of connections to Redis and a limit; 0 for none."""
        self._rate = RateLimitItemPerMinute(per_minute) if per_minute else None
        storage = RedisStorage(
            "async+redis://", implementation="redispy", key_prefix="urm:limits", connection_pool=connections
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)

    async def count_request(self, request: Request, _: Annotated[object, Security(bearer)]) -> None:
        """A dependency of routes that counts a request."""
        await self.count(request, 1)

    async def count(self, request: Request, cost: int) -> None:
        """Count a request as so many.

        Raises:
            ApiError: They are beyond the limit.
        """
        token = request.scope.get("state", {}).get("token")
        caller = f"token {token}" if token else f"address {request.client.host if request.client else ''}"
        if self._rate is not None and not await self._limiter.hit(self._rate, caller, cost=cost):
            raise ApiError(
                "rate-limited",
                "requests",
                expected=f"at most {self._rate.amount} requests and events a minute",
                got="more",
                remedy="repeat the request after the time in Retry-After",
            )


def _require_scope(token: Token | None, kind: str, scope: Allowed) -> None:
    if token is None:
        raise ApiError(
            "no-token",
            "header 'Authorization'",
            expected="Bearer and a token of this API",
            got="an unknown token" if kind else "none",
            remedy="ask its operator for one (`urm recall token create`)",
        )
    if scope not in token.scopes and Allowed.ADMIN not in token.scopes:
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
