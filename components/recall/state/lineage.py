"""Lineage of an event: what its mark in Redis says of it, from acceptance to the served result.

The mark (`accepted_key`) is a hash and lives a day:

    entry, user                       the stream entry of the event, whose id holds the time of acceptance, and its user
    digest                            of what the client sent; none once it was replayed from the dead letters
    done, batch, release, revision    written by the script that acknowledges it: when, in which batch (worker and
                                      number, as in the worker's log), with which release, and the revision of the
                                      user's history whose result knows the event
    dead                              when it became a dead letter
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """What a batch of entries was finished with.

    Attributes:
        batch: Worker and number of the batch.
        release: Name of the release.
        revisions: By user, the revision of the history that the results were computed from.
    """

    batch: str
    release: str
    revisions: Mapping[str, int]


def done_fields(served: Served, user_id: str) -> list[str]:
    """Fields and values, one after the other, that a finished event gets."""
    revision = served.revisions.get(user_id, 0)
    of_batch = ["batch", served.batch, "release", served.release, "revision", str(revision)]
    return ["done", f"{time.time():.3f}", *of_batch]
