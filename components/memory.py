"""Memory of a process: what is kept, what is given back, how often Python collects garbage."""

import ctypes
import gc
import importlib
import os
from types import ModuleType

OBJECTS_BEFORE_COLLECTION = 50_000  # that requests leave behind; reads leave next to none
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

_libc = ctypes.CDLL(None)
_mallopt, _trim = (getattr(_libc, name, None) for name in ("mallopt", "malloc_trim"))  # of glibc only
if _trim is not None:
    _trim.argtypes = [ctypes.c_size_t]


def keep_freed_memory() -> None:
    """Let glibc keep what it would give back to the system, up to a gibibyte per array.

    A training step frees and asks for arrays of a hundred megabytes; fresh pages each time would cost a quarter of it.
    """
    if _mallopt is not None:
        _mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        _mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def disable_primitive_cache() -> None:
    """Disable the caches of oneDNN primitives; to be called before torch is imported.

    Where a CPU multiplies bfloat16, oneDNN prepares a primitive per shape of the matrices, some 350 KiB each, and keeps
    1,024 of them, as does torch once more. Hardly two batches of requests have the same shapes, so the caches only cost
    memory. A limit that the environment sets already stays.
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
    """Exempt existing objects from garbage collection, and collect rarely.

    No request is answered during a collection; by default, at 1,000 reads per second, about one collection per second
    walks through all that was imported (`benchmarks/reads.py`).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(OBJECTS_BEFORE_COLLECTION)


def import_quickly(name: str) -> ModuleType:
    """Import a module while no garbage is collected; what exists afterwards is exempt from collections.

    The imports of a stage make a million objects that stay. Looking through them again and again takes a seventh of an
    import's time, and a second of every full collection after it.
    """
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()
        gc.freeze()
