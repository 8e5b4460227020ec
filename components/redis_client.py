"""One way to reach Redis, and one sentence when it does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import redis

from components.exceptions import ConfigError, UnavailableError

CONNECT_TIMEOUT_SECONDS = 3.0
# Longer than any blocking read, so that a paused server is noticed and a quiet stream is not taken for one.
SOCKET_TIMEOUT_SECONDS = 15.0


def open_redis(url: str, timeout_seconds: float = SOCKET_TIMEOUT_SECONDS) -> redis.Redis:
    """A client that returns str; it connects on first use, and waits for an answer at most `timeout_seconds`.

    Bytes that are no UTF-8 come as lone surrogates and go back as the bytes they were: whatever somebody else has put
    into a stream can be read, refused and kept.

    Raises:
        ConfigError: The URL is not one of Redis.
    """
    try:
        return redis.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="surrogateescape",
            socket_connect_timeout=min(CONNECT_TIMEOUT_SECONDS, timeout_seconds),
            socket_timeout=timeout_seconds,
        )
    except ValueError as error:
        raise ConfigError(
            "URM_REDIS_URL", expected="redis://host:port/db", got=hide_password(url), remedy="correct it"
        ) from error


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn a lost or refused connection, and a full Redis, into one sentence.

    Raises:
        UnavailableError: Redis does not answer or is full.
    """
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise UnavailableError(
            f"Redis at {hide_password(url)}",
            expected="an answer",
            got=str(error).rstrip("."),
            remedy="start it with `urm up` or set URM_REDIS_URL",
        ) from error
    except redis.RedisError as error:
        if not is_full(error):
            raise
        raise UnavailableError(  # without Redis' own words, which quote the command and with it the event
            f"Redis at {hide_password(url)}",
            expected="room for a write",
            got="none below its maxmemory",
            remedy="make room or raise the limit as the runbook says under `Redis full`, then try again",
        ) from None


def is_full(error: redis.RedisError) -> bool:
    """Whether Redis refuses to write because it has used all the memory that it may use (`maxmemory`)."""
    return isinstance(error, redis.exceptions.OutOfMemoryError) or "OOM command not allowed" in str(error)


def hide_password(url: str) -> str:
    """The URL without its credentials, for messages."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
