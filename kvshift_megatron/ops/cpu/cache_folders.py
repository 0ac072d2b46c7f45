"""Where compiled files may be kept, the best place first."""

import os
from collections.abc import Iterator
from pathlib import Path

# The folder of compiled files; if not set, kvshift_megatron in the user's cache.
VARIABLE = "KVSHIFT_CACHE_DIR"
# Often different file systems; programs may not be run from each.
_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")


def candidates() -> Iterator[Path]:
    """Yield the user's folder, then folders of this user's own on other file systems.

    The first one may be full, not writable or not there. Whether they can be trusted is for the
    caller to check.
    """
    if folder := cache_folder():
        yield folder
    name = f"kvshift_megatron-{os.geteuid()}"
    temporary = [base for base in (os.environ.get("TMPDIR"), *_TEMPORARY) if base]
    yield from (Path(base) / name for base in dict.fromkeys(temporary))


def cache_folder() -> Path | None:
    """Return KVSHIFT_CACHE_DIR, or kvshift_megatron in XDG_CACHE_HOME or ~/.cache.

    None if the user has no home directory. As its specification says, a relative XDG_CACHE_HOME is
    ignored.
    """
    if asked := os.environ.get(VARIABLE):
        return _without_tilde(asked)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        home = _without_tilde("~")
        if home is None or not home.is_absolute():
            return None
        base = home / ".cache"
    return base / "kvshift_megatron"


def _without_tilde(path: str) -> Path | None:
    # Unlike Path.expanduser this takes HOME= for no home directory, and does not raise.
    expanded = os.path.expanduser(path)
    return None if expanded.startswith("~") else Path(expanded)
