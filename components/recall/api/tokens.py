"""Bearer tokens of the recall API: who may read recall, write events, ask the model.

    {"tokens": [{"name": "web-shop", "scopes": ["read", "write"], "sha256": "…"}]}

The file holds SHA-256 digests; a token is shown once, when it is made. A token is 256 random bits, so that its digest
needs no salt and no slow hash. The file is read again when it changes, as a Kubernetes Secret does.
"""

import fcntl
import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import structlog
from pydantic import AwareDatetime, Field, ValidationError

from components.addresses import write_json
from components.config import Model
from components.exceptions import ConfigError

log = structlog.get_logger()
PREFIX = "urm_"  # so that scanners for leaked secrets can know one


class Scope(StrEnum):
    """What a token allows."""

    READ = "read"  # stored recall, tasks, lineage
    WRITE = "write"  # events
    ASK = "ask"  # the model, through ad-hoc requests


class Token(Model):
    """One token, without its secret.

    Attributes:
        name: Whose it is; stands in the log of requests.
        scopes: What it allows.
        sha256: Digest of the token, in hexadecimal digits.
        created_at: When it was made.
    """

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created_at: AwareDatetime | None = None


class TokenList(Model):
    """Content of the file."""

    tokens: tuple[Token, ...] = ()


class Tokens:
    """The tokens of a file, kept up to date."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigError: It cannot be read.
        """
        self._path = path
        self._version: tuple[int, ...] = ()
        self._said = ""  # why it cannot be read now
        self._by_digest = _by_digest(path)

    def find(self, secret: str) -> Token | None:
        """The token of this secret, or None if there is no such token."""
        try:
            found = self._path.stat()
            version = (
                found.st_mtime_ns,
                found.st_ino,
                found.st_size,
            )  # two changes may fall into one tick of the clock
            if version != self._version:
                self._by_digest = _by_digest(self._path)
                self._version = version
        except FileNotFoundError:  # whoever takes the file away revokes every token
            if self._by_digest:
                log.error("token file is gone, no token is valid")
            self._by_digest, self._version = {}, ()
        except (OSError, ConfigError) as error:  # while somebody edits the file, what was read before counts
            if self._said != (said := str(error)):
                log.error("tokens cannot be read, the earlier ones stay", error=said)
            self._said = said
        else:
            self._said = ""
        return self._by_digest.get(digest(secret))


def _by_digest(path: Path) -> dict[str, Token]:
    return {token.sha256: token for token in read_tokens(path).tokens}


def read_tokens(path: Path) -> TokenList:
    """The tokens of a file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return TokenList.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _unreadable(path, f"{first['msg']}{f' at {place}' if place else ''}") from None


def issue_token(path: Path, name: str, scopes: list[Scope]) -> str:
    """Make a token, note its digest in the file, which is made if it is not there, and return the token.

    Raises:
        ConfigError: The name is taken or malformed, or the file cannot be read or written.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        token = Token(name=name, scopes=tuple(scopes), sha256=digest(secret), created_at=datetime.now(UTC))
    except ValidationError as error:
        raise ConfigError(
            f"token {name!r}", expected="a name of letters, digits, . _ and -, and a scope",
            got=error.errors()[0]["msg"], remedy="fix it",
        ) from None  # fmt: skip
    with _only_change(path):
        known = read_tokens(path).tokens if path.exists() else ()
        if any(one.name == name for one in known):
            raise ConfigError(
                f"token {name!r}",
                expected="a new name",
                got="one in use",
                remedy="choose another, or revoke that one first",
            )
        _write(path, (*known, token))
    return secret


def revoke_token(path: Path, name: str) -> None:
    """Take a token out of the file; running API processes refuse it from then on.

    Raises:
        ConfigError: There is no such token, or the file cannot be read or written.
    """
    read_tokens(path)  # or ConfigError, before a lock is made beside what is not there
    with _only_change(path):
        known = read_tokens(path).tokens
        left = tuple(token for token in known if token.name != name)
        if len(left) == len(known):
            names = ", ".join(token.name for token in known) or "none"
            raise ConfigError(f"token {name!r}", expected=f"one of {names}", got="another", remedy="name a known token")
        _write(path, left)


def digest(secret: str) -> str:
    """SHA-256 of a token in hexadecimal digits."""
    return hashlib.sha256(secret.encode()).hexdigest()


@contextmanager
def _only_change(path: Path) -> Iterator[None]:
    """Let no other change come between reading and writing the file, which would be lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("w")
    except OSError as error:
        raise _unwritable(path, error) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, tokens: tuple[Token, ...]) -> None:
    try:
        write_json(str(path), json.loads(TokenList(tokens=tokens).model_dump_json()))
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"token file {path}",
        expected="a file that can be written",
        got=error.strerror or error,
        remedy="choose another",
    )


def _unreadable(path: Path, got: object) -> ConfigError:
    return ConfigError(
        f"token file {path}",
        expected="the file that `urm recall token create` writes",
        got=got,
        remedy="make one with `urm recall token create`, or correct URM_API_TOKENS_FILE",
    )
