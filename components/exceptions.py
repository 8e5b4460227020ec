"""Errors the system raises on purpose, each message one sentence: subject, expected, got, remedy."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UrmError(Exception):
    """Base of every error raised on purpose; the CLI prints it without a traceback."""

    exit_code = 1


class UserError(UrmError, ValueError):
    """A mistake in the input that no retry can fix: configuration, data, arguments.

    The CLI exits with code 2 and Airflow does not retry.
    """

    exit_code = 2

    def __init__(self, subject: str, *, expected: str, got: object, remedy: str) -> None:
        super().__init__(_sentence(subject, expected, got, remedy))


class ConfigError(UserError):
    """A configuration value is unknown, missing or out of range."""


class DataError(UserError):
    """The data breaks a rule of the canonical tables."""


class QualityError(UserError):
    """Too large a share of the rows was refused by validation."""


class MissingInputError(UserError):
    """A stage needs the result of an earlier stage that is not there."""


class GateError(UserError):
    """The model is not good enough for what was asked, and nobody said to go on anyway."""


class ReleaseError(UserError):
    """A release bundle is incomplete, altered, or refused by the smoke check."""


class RelayedError(UserError):
    """The mistake that ended another process, in the sentence of that process."""

    def __init__(self, sentence: str) -> None:
        UrmError.__init__(self, sentence)


class UnavailableError(UrmError):
    """A service that should answer does not; trying again later may help."""

    exit_code = 3

    def __init__(self, subject: str, *, expected: str, got: object, remedy: str) -> None:
        super().__init__(_sentence(subject, expected, got, remedy))


class StoppedError(UrmError):
    """SIGTERM ended the work early; started again, it goes on from what it saved."""

    exit_code = 143  # 128 + SIGTERM, as a shell reports it

    def __init__(self, subject: str, *, expected: str, got: object, remedy: str) -> None:
        super().__init__(_sentence(subject, expected, got, remedy))


@contextmanager
def full_disk_errors(subject: str, content: str) -> Iterator[None]:
    """Say in one sentence that a disk has no room for some content.

    Raises:
        UnavailableError: The disk, or a user's share of it, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UnavailableError(
            subject, expected=f"room for {content}", got="a full disk", remedy="free it, or use a larger one"
        ) from error


def _sentence(subject: str, expected: str, got: object, remedy: str) -> str:
    found = " ".join(str(got).split()).rstrip(".") or "nothing"  # other libraries' messages span lines
    return f"{subject}: expected {expected}, got {found}; {remedy}."
