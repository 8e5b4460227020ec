"""What happens around every request of the API: an id, a size limit, a log line, a time, and who may ask."""

import re
import time
import uuid
from typing import Annotated, Any

import redis
import structlog
from fastapi import FastAPI, Request, Security
from fastapi.security import HTTPBearer
from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.recall.api.problems import REQUEST_ID, ApiError, answer, too_large
from components.recall.api.tokens import Scope as Allowed
from components.recall.api.tokens import Token, Tokens
from components.recall.telemetry.metrics import ApiMetrics
from components.redis_client import is_unavailable

log = structlog.get_logger()
MAX_BODY_BYTES = 4 * 2**20  # a thousand events of usual size are a tenth of it
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
bearer = HTTPBearer(auto_error=False, description="Needed where the API was started with a token file.")


# What a request under /v1/ needs, where it is not the scope `read`.
_SCOPES = {("POST", "/v1/events"): Allowed.WRITE, ("POST", "/v1/recall"): Allowed.ASK}


def install(app: FastAPI, metrics: ApiMetrics, tokens: Tokens | None) -> None:
    """Give every request an id, a time and a log line; refuse strangers, and bodies that are too large."""
    app.add_middleware(surround, metrics=metrics, tokens=tokens)


def surround(app: ASGIApp, metrics: ApiMetrics, tokens: Tokens | None) -> ASGIApp:
    """Take down what becomes of every request; without tokens anybody may ask.

    Plain ASGI: Starlette's `middleware("http")` runs each request in a task of its own, which costs a read as much as
    the rest of it.
    """

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 500  # default for an unhandled error

        async def name(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers.setdefault("Cache-Control", "no-store")  # answers are of one user and one moment
            await send(message)

        try:
            await (_refuse(scope, tokens) or app)(scope, _limit(receive), name)
        finally:
            _note(scope, status, time.perf_counter() - started, metrics)

    return handle


def _note(scope: Scope, status: int, seconds: float, metrics: ApiMetrics) -> None:
    # The route's template, not the path: that names a user.
    route = getattr(scope.get("route"), "path_format", "unmatched")
    metrics.requests.labels(route=route, status=str(status)).observe(seconds)
    write = log.warning if status >= 500 else log.debug
    token = scope.get("state", {}).get("token")
    write("request", method=scope["method"], route=route, status=status, seconds=round(seconds, 5), token=token)


def _refuse(scope: Scope, tokens: Tokens | None) -> ASGIApp | None:
    """The answer to a request that is refused before its body is read: without a token of its scope, or too large."""
    headers = Headers(scope=scope)
    if tokens is not None and scope["path"].startswith("/v1/"):
        kind, _, secret = headers.get("authorization", "").partition(" ")
        token = tokens.find(secret.strip()) if kind.lower() == "bearer" else None
        try:
            _require_scope(token, kind, _SCOPES.get((scope["method"], scope["path"]), Allowed.READ))
        except ApiError as error:
            return answer(error)
        scope.setdefault("state", {})["token"] = token.name if token else None
    announced = headers.get("content-length", "")
    return too_large(MAX_BODY_BYTES) if announced.isdecimal() and int(announced) > MAX_BODY_BYTES else None


def _limit(receive: Receive) -> Receive:
    """Count a body that does not announce its length, or not truly."""
    taken = 0

    async def count() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_BODY_BYTES:
            raise HTTPException(413)
        return message

    return count


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
            ApiError: They are beyond the limit, or beyond what any caller may ever send at once.
        """
        if self._rate is None:
            return
        if cost > self._rate.amount:
            raise ApiError(
                "body-too-large",
                "events",
                expected=f"at most {self._rate.amount} in one request, which is the limit of a minute",
                got=cost,
                remedy="send them in several requests",
            )
        token = request.scope.get("state", {}).get("token")
        caller = f"token {token}" if token else f"address {request.client.host if request.client else ''}"
        try:
            within = await self._limiter.hit(self._rate, caller, cost=cost)
        except redis.ResponseError as error:
            if not is_unavailable(error):
                raise
            within = True  # a Redis that takes no writes can still be read
        if not within:
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
    if scope not in token.scopes:
        raise ApiError(
            "missing-scope",
            f"token {token.name!r}",
            expected=f"the scope {scope}",
            got=", ".join(token.scopes),
            remedy="use another token",
        )
