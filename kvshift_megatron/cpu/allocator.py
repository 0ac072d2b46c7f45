"""Keeps memory that tensors have freed, so that the next ones need no fresh pages.

glibc maps new pages for every big tensor and gives them back when it is freed; the kernel then
clears each page once more, which costs several times what writing the tensor does.
"""

import ctypes
import os
import platform
import sys

# 0: glibc's own behaviour.
VARIABLE = "KVSHIFT_KEEP_MEMORY"

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# glibc's limits where nothing is set, in a process that has freed blocks of any size: with the
# first call of mallopt it stops moving them by itself.
_MMAP_MAX_DEFAULT, _MMAP_THRESHOLD_LARGEST = 65536, 32 * 2**20

_keeps = False


def keep_freed_memory() -> bool:
    """Lets glibc take every block from its heap and never shrink it, in the whole process.

    Memory stays at the highest that the process has used.

    Returns:
        Whether that is so now. False, and nothing is changed, on other C libraries, where the
        user has settled it (KVSHIFT_KEEP_MEMORY=0, MALLOC_* or GLIBC_TUNABLES), or where glibc
        refuses.
    """
    global _keeps
    if _keeps:
        return True
    libc = _glibc()
    if libc is None or os.environ.get(VARIABLE) == "0" or _is_settled():
        return False
    # Not a higher threshold: glibc takes none above 32 MB.
    _keeps = libc.mallopt(_MMAP_MAX, 0) == 1 and libc.mallopt(_TRIM_THRESHOLD, -1) == 1
    return _keeps


def give_back() -> None:
    """Ends `keep_freed_memory` and returns what is free to the system."""
    global _keeps
    if not _keeps:
        return
    libc = _glibc()
    libc.mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
    libc.mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, 2 * _MMAP_THRESHOLD_LARGEST)
    libc.malloc_trim(0)
    _keeps = False


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _is_settled() -> bool:
    """Whether the user has set these limits; glibc has read them at the process's start."""
    names = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in names) or any(
        f"glibc.malloc.{name}" in tunables
        for name in ("mmap_max", "mmap_threshold", "trim_threshold")
    )
