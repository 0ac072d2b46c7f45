"""Keep memory that tensors have freed, so that the next tensors need no new pages.

glibc maps new pages for every large tensor and returns them when it is freed. The kernel then has
to clear each page again, which takes several times as long as writing the tensor.
"""

import ctypes
import os
import platform
import sys

# Set to 0 to keep glibc's own behaviour.
VARIABLE = "KVSHIFT_KEEP_MEMORY"

# From malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# What glibc's limits become by default in a process that has freed blocks of any size. They have to
# be restored by hand: after the first call of mallopt glibc no longer adjusts them.
_MMAP_MAX_DEFAULT, _MMAP_THRESHOLD_LARGEST = 65536, 32 * 2**20

_keeps = False


def keep_freed_memory() -> bool:
    """Have glibc take every block from its heap and never shrink it, in the whole process.

    The process's memory then stays at its peak.

    Returns:
        Whether this is in force. It is False, and nothing is changed, with other C libraries, if
        the user has set these limits (KVSHIFT_KEEP_MEMORY=0, MALLOC_* or GLIBC_TUNABLES), or if
        glibc refuses.
    """
    global _keeps
    if _keeps:
        return True
    libc = _glibc()
    if libc is None or os.environ.get(VARIABLE) == "0" or _is_settled():
        return False
    # Raising the threshold would not do: glibc accepts none above 32 MB.
    _keeps = libc.mallopt(_MMAP_MAX, 0) == 1 and libc.mallopt(_TRIM_THRESHOLD, -1) == 1
    return _keeps


def give_back() -> None:
    """Undo `keep_freed_memory` and return free memory to the system."""
    global _keeps
    libc = _glibc() if _keeps else None
    if libc is None:
        return
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
    """Return whether the user has set these limits, which glibc reads when the process starts."""
    names = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in names) or any(
        f"glibc.malloc.{name}" in tunables
        for name in ("mmap_max", "mmap_threshold", "trim_threshold")
    )
