"""What a process keeps of freed memory and of prepared products."""

import ctypes
import gc
import sys

import psutil
import pytest

from components.memory import import_quickly, trim_memory
from tests.worlds import run_python

MIB = 2**20
NEEDS_GLIBC = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
# MiB that a process holds of an array of 256 that it has freed.
FREE = """
import sys
from components.memory import keep_freed_memory
if sys.argv[1] == "all":
    keep_freed_memory()
import numpy, psutil
before = psutil.Process().memory_info().rss
array = numpy.ones(2**25)
del array
print((psutil.Process().memory_info().rss - before) / 2**20)
"""

# MiB that a process keeps of 300 products of bfloat16 matrices, none of the shape of another.
MULTIPLY = """
import sys
from components.memory import disable_primitive_cache
if sys.argv[1] == "none":
    disable_primitive_cache()
import psutil, torch
torch.set_num_threads(1)
weights = torch.ones(576, 1736, dtype=torch.bfloat16)
torch.ones(99, 576, dtype=torch.bfloat16) @ weights
before = psutil.Process().memory_info().rss
for rows in range(100, 400):
    torch.ones(rows, 576, dtype=torch.bfloat16) @ weights
print((psutil.Process().memory_info().rss - before) / 2**20)
"""


def resident() -> float:
    return float(psutil.Process().memory_info().rss) / MIB


def held(code: str, how: str) -> float:
    return float(run_python("-c", code, how, check=True).stdout)


@NEEDS_GLIBC
def test_freed_memory_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(64 * 1024) for _ in range(1024)]
    for block in blocks:
        ctypes.memset(block, 1, 64 * 1024)
    last = libc.malloc(64 * 1024)  # keeps glibc from giving back the end of the heap by itself
    for block in blocks:
        libc.free(block)
    before = resident()
    trim_memory()
    libc.free(last)
    assert before - resident() > 48


def test_products_of_many_shapes_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(variable, raising=False)
    if held(MULTIPLY, "all") < 50:  # seen, not asked: CPUs that do not name bfloat16 may go through oneDNN as well
        pytest.skip("this CPU multiplies bfloat16 without oneDNN")
    assert held(MULTIPLY, "none") < 20


@NEEDS_GLIBC
def test_freed_arrays_stay_with_a_process_that_will_ask_for_them_again() -> None:
    assert held(FREE, "none") < 20
    assert held(FREE, "all") > 200


def test_no_garbage_is_collected_during_a_quick_import_nor_among_what_it_made(tmp_path, monkeypatch):
    (tmp_path / "quick.py").write_text("import gc\nenabled = gc.isenabled()\ncells = [[] for _ in range(1000)]\n")
    (tmp_path / "broken.py").write_text("raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    frozen = gc.get_freeze_count()
    module = import_quickly("quick")
    assert module is sys.modules.pop("quick")
    assert not module.enabled
    assert gc.get_freeze_count() >= frozen + 1000
    with pytest.raises(ValueError, match="broken"):
        import_quickly("broken")
    assert gc.isenabled()
