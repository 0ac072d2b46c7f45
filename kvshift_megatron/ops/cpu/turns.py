"""Let one process build while the others of a node wait, but not forever."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

# Between two looks at a lock that another process holds.
_PAUSE = 0.05
# For what the holder does beside the build itself.
_GRACE = 5


class BuildError(RuntimeError):
    """Compiling or loading failed; the message is a clause that says why."""


class TooSlowError(BuildError):
    """The compiler exceeded its time."""


@contextlib.contextmanager
def turn(lock: Path, seconds: float) -> Iterator[None]:
    """Hold a lock file while the block builds something; its failure is that of all who waited.

    The system releases the lock if its holder dies. After `seconds` and some grace, and on a file
    system without locks, the block runs all the same.

    Args:
        lock: Created if it is missing, in a folder that only this user can write to. It stays, and
            holds the message of a failed build.
        seconds: What one build may take.

    Raises:
        BuildError: The process that was waited for could not build.
        OSError: The file cannot be opened.
    """
    since = time.time()
    with open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+") as file:
        if _wait_for(file.fileno(), seconds + _GRACE):
            said = file.read()
            # An older failure is that of another run.
            if said and os.fstat(file.fileno()).st_mtime >= since:
                raise _failure(said)
        try:
            yield
        except BuildError as error:
            _note(file.fileno(), f"{type(error).__name__}\n{error}")
            raise
        _note(file.fileno(), "")


def _wait_for(descriptor: int, seconds: float) -> bool:
    """Take the lock, and return whether another process held it first."""
    deadline, waited = time.monotonic() + seconds, False
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            time.sleep(_PAUSE)
        except OSError:  # no locks on this file system
            return False
        else:
            return waited
    return False


def _note(descriptor: int, text: str) -> None:
    # A full disk must not hide why the build failed.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _failure(said: str) -> BuildError:
    kind, _, message = said.partition("\n")
    return (TooSlowError if kind == TooSlowError.__name__ else BuildError)(message)
