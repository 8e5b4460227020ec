"""Memory of the recall runtime's processes: what is given back, and how often Python looks for garbage."""

from __future__ import annotations

import ctypes
import gc

OBJECTS_BEFORE_COLLECTION = 50_000  # that requests leave behind; reads leave next to none

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
if _trim is not None:
    _trim.argtypes = [ctypes.c_size_t]


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library can.

    glibc keeps what is freed and cannot tell that most of it serves nothing until the next batch, which may be another
    instance's. Giving it back costs some milliseconds, and the next batch as many to be given new pages.
    """
    if _trim is not None:
        _trim(0)


def collect_rarely() -> None:
    """Spare the garbage collector what there is by now, and look for garbage rarely.

    No request is answered while it walks; by itself, at 1,000 reads a second, it walks about once a second through all
    that was imported (`benchmarks/reads.py`).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(OBJECTS_BEFORE_COLLECTION)
