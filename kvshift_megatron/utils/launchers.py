"""Child processes: let them find this package, and stop torch's launcher.

Each rank of torch's launcher has its own session, so a signal to the launcher's session does not
reach it.
"""

import contextlib
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

PATIENCE = 15.0  # seconds


def own_path() -> list[Path]:
    """Return what a child's PYTHONPATH needs to find this package: nothing if it is installed.

    The folder of installed packages must not be on PYTHONPATH: it would come before Python's own
    library.
    """
    folder = Path(__file__).resolve().parents[2]
    return [] if folder == Path(sysconfig.get_path("purelib")).resolve() else [folder]


def stop(launchers: Iterable[subprocess.Popen]) -> None:
    """Terminate the launchers, which end their ranks; kill what is left after PATIENCE.

    Args:
        launchers: Started with `start_new_session=True`; those that have ended are left alone.
    """
    running = [process for process in launchers if process.poll() is None]
    ranks = {process.pid: _children(process.pid) for process in running}
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        # Nothing is left here unless the launcher was too slow.
        for session in (process.pid, *ranks[process.pid]):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
        process.wait()


def _children(pid: int) -> list[int]:
    """Return the direct children of a process (Linux)."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:  # the process has ended, or there is no /proc
        return []
    return [int(word) for word in text.split()]
