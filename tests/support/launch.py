"""Starting ranks, bounded in time and leaving no process behind.

With torch's own launcher, as a user does, or from a process that has imported Megatron already.
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


def ranks(
    nproc: int,
    module: str,
    arguments: list[str],
    timeout: float,
    forks: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess:
    """What `torchrun` of `-m MODULE ARGUMENTS` does, by ranks that need not import Megatron first.

    They are forked from a process that all launches of this environment share (rank_server.py).
    `forks`: whether the module forks runs of its own, as the planned ones of tests/integration. The
    other arguments and what is returned or raised are as with `torchrun`.
    """
    given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environment}
    # The one variable that pytest changes all the time.
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


_GRACE = 120  # seconds beside a launch's own: for the imports, and for ending it


class _RankServer:
    """A process of rank_server.py."""

    def __init__(self, environment: dict[str, str]):
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
        """Its answer; a RuntimeError where it ends without one, queue.Empty where it is late."""
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
