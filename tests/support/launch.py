"""Start ranks within a time limit, and leave no process running.

With torch's own launcher, as a user does, or from a process that has already imported Megatron.
"""

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from kvshift_megatron.utils import launchers

PROJECT = Path(__file__).resolve().parents[2]


def python_path() -> str:
    """Return a rank's PYTHONPATH: the project, then this process's.

    In `make test-matrix` the latter leads to another release of megatron-core.
    """
    return os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))


def torchrun(
    nproc: int, arguments: list[str], timeout: float, **environment: str
) -> subprocess.CompletedProcess:
    """Run `torchrun --standalone --nproc-per-node NPROC ARGUMENTS` from the project's root.

    Args:
        nproc: Number of ranks.
        arguments: What follows torchrun's own flags: a script or `-m module`, and its arguments.
        timeout: Seconds, after which all processes are killed and TimeoutExpired is raised.
        **environment: Added to this process's.

    Returns:
        The finished launch; `stdout` holds stdout and stderr of all ranks.
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


def ranks(
    nproc: int,
    module: str,
    arguments: list[str],
    timeout: float,
    forks: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Do what `torchrun` does for `-m MODULE ARGUMENTS`, with ranks that already have Megatron.

    They are forked from a process that all launches of this environment share (rank_server.py).
    `forks` says whether the module forks runs itself, as forked_runs.py does. The other arguments,
    the result and the exceptions are those of `torchrun`.
    """
    given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environment}
    # Without the variable that pytest changes for every test.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    environment = {**inherited, **given}
    key = json.dumps(environment, sort_keys=True)
    server = _servers.get(key)
    if server is None:
        server = _servers[key] = _RankServer(environment)
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        request = {"ranks": nproc, "module": module, "arguments": arguments, "forks": forks}
        request |= {"output": output.name, "timeout": timeout}
        try:
            answer = server.answer(request, timeout + _GRACE)
        except BaseException:
            del _servers[key]
            server.stop()
            raise
        said = output.read()
    if answer["timed_out"]:
        raise subprocess.TimeoutExpired([module, *arguments], timeout, said)
    return subprocess.CompletedProcess([module, *arguments], answer["returncode"], said)


_GRACE = 120  # seconds on top of a launch's own, for the imports and for ending it


class _RankServer:
    """A process that runs rank_server.py."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.rank_server"],
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def answer(self, request: dict, timeout: float) -> dict:
        """Return its answer.

        Raises:
            RuntimeError: It ended without an answer.
            queue.Empty: The answer did not come in time.
        """
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        if line := self._answers.get(timeout=timeout):
            return json.loads(line)
        self._errors.seek(0)
        raise RuntimeError(f"the server of ranks has ended: {self._errors.read()[-3000:]}")

    def stop(self) -> None:
        launchers.stop([self._process])


_servers: dict[str, _RankServer] = {}


@atexit.register
def _stop_all() -> None:
    for server in _servers.values():
        server.stop()
