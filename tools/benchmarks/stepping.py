"""Control several runs of Megatron's loop, of which one works at a time."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path

_START_S, _WINDOW_S, _END_S = 240, 180, 60
_LONGEST_ADDRESS = 100  # bytes of a socket's path that the system accepts


class RunFailed(RuntimeError):
    """A run ended or stopped answering; the message carries its last lines."""


@dataclass
class Run:
    """One launch of Megatron's loop, which waits between windows of steps.

    Attributes:
        name: Name in messages and of the log file.
        flags: Command line of kvshift_megatron.pretrain.
        ranks: Number of processes.
        environment: Variables in addition to this process's own.
    """

    name: str
    flags: list[str]
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, folder: Path) -> None:
        """Launch the ranks without waiting for them; see `wait_until_ready`."""
        self._log = folder / f"{self.name}.log"
        address = str(folder / f"{self.name}.socket")
        if len(address) > _LONGEST_ADDRESS:
            raise RunFailed(
                f"the folder for temporary files is too deep for a socket ({address}): set TMPDIR "
                "to one with a shorter name"
            )
        self._listener = Listener(address, backlog=self.ranks)
        self._listener._listener._socket.settimeout(1.0)
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        threads = max(1, cores // self.ranks)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(self.ranks), "-m", f"{__package__}.step_worker"]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [*command, address, *self.flags],
                env={"OMP_NUM_THREADS": str(threads)} | os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._connections: list[Connection] = []

    def wait_until_ready(self) -> None:
        """Wait until every rank has connected; it then goes on to its first step and waits."""
        until = time.monotonic() + _START_S
        with contextlib.closing(self._listener):
            while len(self._connections) < self.ranks:
                with contextlib.suppress(TimeoutError):
                    self._connections.append(self._listener.accept())
                if self._process.poll() is not None or time.monotonic() > until:
                    raise self._failure("did not start")
        for connection in self._connections:
            self._answer(connection, "ready", _START_S)

    def window(self, steps: int) -> float:
        """Take that many steps and return the seconds of the slowest rank."""
        self._tell(steps)
        return max(self._answer(c, "window", _WINDOW_S) for c in self._connections)

    def ask_figures(self) -> dict:
        """Let the run end by itself, and return each figure's maximum over the ranks."""
        self._tell(0)
        figures = [self._answer(c, "end", _WINDOW_S) for c in self._connections]
        return {name: max(f[name] for f in figures) for name in figures[0]}

    def wait_until_ended(self) -> None:
        """Wait until the run has ended, which must be without an error."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            raise self._failure("did not end") from None
        if code != 0:
            raise self._failure(f"ended with exit code {code}")

    def stop(self) -> None:
        """End what is left of the run; ranks whose connection closes end by themselves."""
        for connection in getattr(self, "_connections", []):
            connection.close()
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _tell(self, steps: int) -> None:
        try:
            for connection in self._connections:
                connection.send(steps)
        except OSError as error:
            raise self._failure("is gone") from error

    def _answer(self, connection: Connection, kind: str, limit_s: float):
        until = time.monotonic() + limit_s
        try:
            while not connection.poll(1.0):
                if self._process.poll() is not None or time.monotonic() > until:
                    raise self._failure(f"did not answer ({kind})")
            said, value = connection.recv()
        except (EOFError, OSError) as error:
            raise self._failure(f"lost ({kind})") from error
        if said != kind:
            raise self._failure(f"said {said!r}, not {kind!r}")
        return value

    def _failure(self, what: str) -> RunFailed:
        lines = self._log.read_text(errors="replace").splitlines()[-15:]
        return RunFailed("\n    ".join([f"the run {self.name} {what}:", *lines]))


def order_of_round(names: list[str], number: int) -> list[str]:
    """Return the order of round `number`: A B C, C B A, A B C, ..."""
    return names if number % 2 == 0 else names[::-1]
