"""Memory of the recall runtime's processes: what is kept, what is given back, how often Python looks for garbage."""

from __future__ import annotations

import ctypes
import gc
import os

OBJECTS_BEFORE_COLLECTION = 50_000  # that requests leave behind; reads leave next to none

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
if _trim is not None:
    _trim.argtypes = [ctypes.c_size_t]


def keep_no_products() -> None:
    """Have no matrix product kept for a shape that may come again; to be called before torch is imported.

    Where a CPU multiplies bfloat16, oneDNN prepares each product for the shape of its matrices, and keeps what it has
    prepared, some 350 KiB a shape, for 1,024 shapes, as does torch once more. Hardly two batches of requests have the
    same shapes, so that it serves nothing. A limit that the environment has already stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # of torch's own


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
