"""What a release is rolled out to: publish it, wait until it serves, undo it (ADR 23)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from components.exceptions import ReleaseError
from components.release.publication import Publication


class Target(Protocol):
    """The workers of one machine (`workers.WorkerFlip`), or the Deployments of a cluster (`kubernetes`).

    Attributes:
        figures: What the last wait measured, by name; empty where nothing is measured.
    """

    figures: Mapping[str, float]

    def hold(self, timeout_seconds: float) -> AbstractContextManager[None]:
        """Let one promotion run at a time.

        Raises:
            UnavailableError: Another promotion does not end in time.
        """

    def require_lock(self) -> None:
        """Refuse to go on if another promotion has taken over, because this one stood still.

        Raises:
            ReleaseError: It has.
        """

    def settle(self, champion: str, last_order: int, timeout_seconds: float) -> Publication | None:
        """Finish or undo what an interrupted promotion left; what serves then.

        Args:
            champion: The release that the registry calls so, which needs no check; empty if there is none.
            last_order: Of the publication that set the registry's aliases last: an earlier one was finished, and serves
                again since somebody went back to it by hand. 0 if there is none.
            timeout_seconds: Longest wait for another one to serve.

        Raises:
            ReleaseError: It can neither be finished nor undone.
        """

    def publish(
        self, release: str, bundle: str, manifest: str = "", notes: Mapping[str, str] | None = None
    ) -> Publication:
        """Ask for a release, by its name, the address of its bundle and the digest of its manifest.

        `notes` say who asks and why, where the target has a place for them. What serves already may be returned as it
        is.

        Raises:
            UnavailableError: Nothing could serve it.
        """

    def wait(self, publication: Publication, timeout_seconds: float) -> None:
        """Return when everything serves the publication.

        Raises:
            ReleaseError: It was rejected, or there was no answer in time.
        """

    def undo(self, publication: Publication) -> None:
        """Ask for what was there before, unless another publication has come since."""


def roll_out(
    target: Target,
    release: str,
    bundle: str,
    timeout_seconds: float,
    manifest: str = "",
    notes: Mapping[str, str] | None = None,
) -> Publication:
    """Publish a release and wait until everything serves it; else undo it.

    That holds however the wait ends, also by SIGTERM: whether the release can be served is not known then.

    Raises:
        UnavailableError: Nothing could serve it.
        ReleaseError: It was rejected, or there was no answer in time.
        redis.RedisError: Redis does not answer.
    """
    publication = target.publish(release, bundle, manifest, notes)
    try:
        target.wait(publication, timeout_seconds)
    except BaseException:
        target.undo(publication)
        raise
    return publication


def overtaken(subject: str) -> ReleaseError:
    """The error of a promotion that may not go on."""
    return ReleaseError(
        subject,
        expected="the only promotion",
        got="another one, which took over when this one stood still",
        remedy="see what serves (`urm releases`), and promote again if that is not what you want",
    )
