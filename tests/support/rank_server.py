"""Starts the ranks of many launches from one process that has imported Megatron once.

python -m tests.support.rank_server

A line of standard input asks for a launch: {"ranks": N, "module": what each of them runs as
`python -m` would, "arguments": of the module, "forks": whether it forks runs of its own, "output":
file for what all of them print, "timeout": seconds}. A line of standard output answers it:
{"returncode": 0, or 1 where a rank failed, "timed_out": whether that was the time}. The end of the
input ends it.

Ranks are forked, so that they need not import what every launch needs. Otherwise they find what
torchrun gives its own: the variables of a rank, and a store in a process that outlives them. Like
torchrun's, they do not outlive the launch, or one of them that failed.
"""

import contextlib
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

from torch.distributed import TCPStore

from tests.support.forked_process import run_and_exit

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PATIENCE = 10  # seconds that ranks have to end after another one has failed


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What an import prints is no answer.
    _import()
    # No collection of garbage touches, and so copies, what all ranks share.
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_launch(answers, **json.loads(line))), file=answers)


def _import() -> None:
    """Everything that takes a rank long to import."""
    from kvshift_megatron import cpu

    cpu.enable()
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt

    with contextlib.suppress(ImportError):  # what the entry point needs, which needs 0.19
        import megatron.core.models.mimo
        import megatron.core.tokenizers.text.libraries
        import megatron.training.training  # noqa: F401

        import kvshift_megatron.training.forward_step
        import kvshift_megatron.training.gpt_builder
        import kvshift_megatron.training.task  # noqa: F401

        _read_flags_once()


def _read_flags_once() -> None:
    """Keep what Megatron reads in its own sources for every parser: half of a short run."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    from kvshift_megatron.cpu.flags import megatron_flags

    read, known = ArgumentGroupFactory._get_field_docstrings, {}

    def docstrings(self, dataclass: type) -> dict[str, str]:
        if dataclass not in known:
            known[dataclass] = read(self, dataclass)
        return dict(known[dataclass])

    ArgumentGroupFactory._get_field_docstrings = docstrings
    megatron_flags()


def _launch(answers: TextIO, ranks: int, output: str, timeout: float, **what: Any) -> dict:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    running: list[int] = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                listening.close()
                answers.close()
                _die_with_the_server()
                # One process group, of the first rank, with all that the ranks start.
                os.setpgid(0, running[0] if running else 0)
                _be(rank, ranks, port, Path(output), **what)
            except BaseException:
                with open(output, "a") as file:
                    traceback.print_exc(file=file)
            finally:
                os._exit(1)  # never another server
        running.append(child)
        with contextlib.suppress(PermissionError):  # it has ended already
            os.setpgid(child, running[0])
    # Behind the forks: it has threads.
    store = TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    answer = _wait(running, time.monotonic() + timeout)
    del store
    return answer


def _wait(ranks: list[int], deadline: float) -> dict:
    group, running = ranks[0], set(ranks)
    failed = timed_out = False
    while running and not timed_out:
        for child in tuple(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            running.remove(child)
            if status and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + _PATIENCE)
                for other in running:
                    os.kill(other, signal.SIGTERM)
        timed_out = time.monotonic() > deadline
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for child in running:
        os.waitpid(child, 0)
    return {"returncode": int(failed or timed_out), "timed_out": timed_out and not failed}


def _die_with_the_server() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _be(
    rank: int, ranks: int, port: int, output: Path, module: str, arguments: list[str], forks: bool
) -> NoReturn:
    """A rank, which ends here."""
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"},
        **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def run() -> None:
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    run_and_exit(run, arguments, output, port, forks)


if __name__ == "__main__":
    main()
