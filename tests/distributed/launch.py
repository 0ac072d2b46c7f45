"""Starting ranks with torch's own launcher, bounded in time and leaving no process behind."""

import os
import subprocess
import sys
from pathlib import Path

from tools import launchers

PROJECT = Path(__file__).resolve().parents[2]


def python_path() -> str:
    """PYTHONPATH of a rank: the project, and behind it what this process was given.

    `make test-matrix` gives it another release of megatron-core.
    """
    return os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))


def torchrun(
    nproc: int, arguments: list[str], timeout: float, **environment: str
) -> subprocess.CompletedProcess:
    """Run `torchrun --standalone --nproc-per-node NPROC ARGUMENTS` from the project's root.

    Args:
        nproc: ranks.
        arguments: what follows torchrun's own flags: a script or `-m module`, and its arguments.
        timeout: seconds; past that every process of the launch is killed and TimeoutExpired raised.
        environment: added to this process's.

    Returns:
        The finished launch; stdout and stderr of all ranks together in `stdout`.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(nproc), *arguments),
    ]
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        launchers.stop([process])
    return subprocess.CompletedProcess(command, process.returncode, output)
