"""Other processes of this package's: where they find it, and how torch's launcher is ended.

Each rank of torch's launcher has a session of its own, which a signal to the launcher's session
does not reach.
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
    """What a child's PYTHONPATH needs to find this package: nothing where it is installed.

    The folder of installed packages on PYTHONPATH would come before Python's own library.
    """
    folder = Path(__file__).resolve().parents[2]
    return [] if folder == Path(sysconfig.get_path("purelib")).resolve() else [folder]


def stop(launchers: Iterable[subprocess.Popen]) -> None:
    """Ends the launchers, which end their ranks; kills what is left after PATIENCE.

    Args:
        launchers: started with `start_new_session=True`; those that have ended are left alone.
    """
    launchers = [process for process in launchers if process.poll() is None]
    ranks = {process.pid: _children(process.pid) for process in launchers}
    for process in launchers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for process in launchers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        # What the launcher left: nothing, unless it was too slow.
        for session in (process.pid, *ranks[process.pid]):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
        process.wait()


def _children(pid: int) -> list[int]:
    """Direct children of a process (Linux)."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:  # gone already, or no /proc
        return []
    return [int(word) for word in text.split()]
