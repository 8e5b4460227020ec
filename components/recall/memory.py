"""Memory of an instance between two batches.

glibc keeps what is freed and cannot tell that most of it serves nothing until the next batch, which may be another
instance's. Giving it back costs some milliseconds, and the next batch as many to be given new pages.
"""

from __future__ import annotations

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library can."""
    if _trim is not None:
        _trim(0)
