import ctypes
import os
import pathlib
import sys

import pytest

from gdro_jax import host_memory


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="of the GNU C library"
)
def test_what_the_heap_keeps_is_given_back():
    libc, size, number = ctypes.CDLL(None), 64 * 1024, 1024
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    blocks = [libc.malloc(size) for _ in range(number)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last one, at the heap's end, keeps the others from being given back
        libc.free(block)
    held = resident()
    host_memory.trim()
    assert held - resident() > size * number // 2
    libc.free(blocks[-1])
