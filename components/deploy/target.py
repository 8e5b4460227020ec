"""What a release is rolled out to: publish it, wait until it serves, undo it."""

from typing import Protocol

from components.release.publication import Publication


class Target(Protocol):
    """The workers of one machine today (`workers.WorkerFlip`)."""

    def publish(self, release: str, bundle: str, manifest: str = "") -> Publication:
        """Ask for a release, by its name, the address of its bundle and the digest of its manifest.

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


def roll_out(target: Target, release: str, bundle: str, timeout_seconds: float, manifest: str = "") -> Publication:
    """Publish a release and wait until everything serves it; else undo it.

    That holds however the wait ends, also by SIGTERM: whether the release can be served is not known then.

    Raises:
        UnavailableError: Nothing could serve it.
        ReleaseError: It was rejected, or there was no answer in time.
        redis.RedisError: Redis does not answer.
    """
    publication = target.publish(release, bundle, manifest)
    try:
        target.wait(publication, timeout_seconds)
    except BaseException:
        target.undo(publication)
        raise
    return publication
