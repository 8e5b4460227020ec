"""One way to reach Redis, and one sentence when it does not answer."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from components.exceptions import ConfigError, UnavailableError

CONNECT_TIMEOUT_SECONDS = 3.0
_LOOPBACK = re.compile(r"127(\.\d+){3}$")
# Redis is there and cannot serve just now: a replica after a fail-over, loading, its disk or its replicas are away, or
# it is in protected mode.
# The code stands at the start of an answer, or behind a script's name.
_UNABLE = re.compile(
    r"(^|[-\s])(READONLY|MISCONF|LOADING|MASTERDOWN|CLUSTERDOWN|NOREPLICAS|TRYAGAIN|UNBLOCKED|BUSY|DENIED)\b"
)
_DEMOTED = re.compile(r"(^|[-\s])(READONLY|MASTERDOWN|UNBLOCKED)\b")
_FULL = "OOM command not allowed"
# Longer than any blocking read, so that a paused server is noticed and a quiet stream is not taken for one.
SOCKET_TIMEOUT_SECONDS = 15.0


def open_redis(url: str, timeout_seconds: float = SOCKET_TIMEOUT_SECONDS) -> redis.Redis:
    """A client that returns str; it connects on first use, and waits for an answer at most `timeout_seconds`.

    Bytes that are no UTF-8 come as lone surrogates and go back as the bytes they were: whatever somebody else has put
    into a stream can be read, refused and kept.

    Raises:
        ConfigError: The URL is not one of Redis, or leads beyond this machine without a password.
    """
    require_password(url)
    try:
        return redis.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="surrogateescape",
            socket_connect_timeout=min(CONNECT_TIMEOUT_SECONDS, timeout_seconds),
            socket_timeout=timeout_seconds,
            # A connection that the server has closed meanwhile is made anew, once; who waits longer decides it himself.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
    except ValueError as error:
        raise ConfigError(
            "URM_REDIS_URL", expected="redis://host:port/db", got=_hide_password(url), remedy="correct it"
        ) from error


def require_password(url: str) -> None:
    """Refuse an address beyond this machine without a password: whoever reaches such a Redis owns what is in it.

    Raises:
        ConfigError: It has none.
    """
    parts = urlsplit(url)
    local = parts.scheme == "unix" or parts.hostname in (None, "localhost", "::1") or _LOOPBACK.match(parts.hostname)
    if not (local or parts.password):
        raise ConfigError(
            "URM_REDIS_URL",
            expected="a password for a Redis beyond this machine",
            got=_hide_password(url),
            remedy="use rediss://USER:PASSWORD@HOST:PORT/0, see docs/operations.md",
        )


def require_no_eviction(memory: Mapping[str, Any]) -> None:
    """Refuse a Redis that would throw accepted events away when it is full, by its answer to `INFO memory`.

    Raises:
        ConfigError: Its maxmemory-policy is another than noeviction.
    """
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigError(
            "Redis' maxmemory-policy",
            expected="noeviction, since evicted keys are accepted events and histories",
            got=policy,
            remedy="set it in Redis' configuration",
        )


@contextmanager
def connect(url: str) -> Iterator[redis.Redis]:
    """What `open_redis` gives, closed at the end, with the sentences of `redis_errors`.

    Raises:
        UnavailableError: Redis does not answer, is full or cannot serve now.
    """
    with redis_errors(url), open_redis(url) as client:
        yield client


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn a lost or refused connection, and a Redis that is full or cannot serve now, into one sentence.

    Raises:
        UnavailableError: Redis does not answer, is full or cannot serve now.
    """
    try:
        yield
    except redis.RedisError as error:
        if is_full(error):
            expected, got = "room for a write", "none below its maxmemory"
            remedy = "make room or raise the limit as the runbook says under `Redis full`, then try again"
        elif is_unavailable(error):  # without the words of an error of a command, which quote it and with it the event
            expected = "an answer"
            got = "an error of a server that cannot serve now" if _is_unable(error) else str(error).rstrip(".")
            remedy = "start it with `urm up` or set URM_REDIS_URL"
        else:
            raise
        raise UnavailableError(f"Redis at {_hide_password(url)}", expected=expected, got=got, remedy=remedy) from None


def is_unavailable(error: Exception) -> bool:
    """Whether Redis does not serve for a while, so that waiting helps: lost, full, read-only, loading, failing over."""
    if not isinstance(error, redis.RedisError):
        return False
    return isinstance(error, redis.ConnectionError | redis.TimeoutError) or is_full(error) or _is_unable(error)


def is_full(error: redis.RedisError) -> bool:
    """Whether Redis refuses to write because it has used all the memory that it may use (`maxmemory`)."""
    return isinstance(error, redis.exceptions.OutOfMemoryError) or _FULL in str(error)


def is_demoted(error: redis.RedisError) -> bool:
    """Whether the server is a replica by now, so that its address may lead to another one."""
    return _DEMOTED.search(_last_words(error)) is not None or isinstance(
        error, redis.exceptions.ReadOnlyError | redis.exceptions.MasterDownError
    )


def _is_unable(error: redis.RedisError) -> bool:
    kinds = redis.exceptions
    known = kinds.ReadOnlyError | kinds.BusyLoadingError | kinds.MasterDownError | kinds.ClusterDownError
    return isinstance(error, known | kinds.TryAgainError) or _UNABLE.search(_last_words(error)) is not None


def _hide_password(url: str) -> str:
    """The URL without what may hold a password: all that stands before the last @, and the query.

    It removes more than `hide_credentials` does: an address whose password is not escaped is reported without it, too.
    """
    shown, _, _ = re.sub(r"(?<=://).*@", "", url).partition("?")
    return shown


def _last_words(error: redis.RedisError) -> str:
    """What the server said, without what stands before it and quotes the user's words."""
    return str(error).rpartition(" of pipeline caused error: ")[2].lstrip("(\"'")  # in asyncio it is a tuple's repr
