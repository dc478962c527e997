"""The host's memory after a compilation."""

import ctypes
import sys


def trim() -> None:
    """Gives back to the system what the C library's heap keeps free: after compiling, that can be hundreds of MiB.

    Does nothing where the C library has no call for it (it is glibc's).
    """
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)
