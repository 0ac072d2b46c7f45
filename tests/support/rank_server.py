"""Start the ranks of many launches from one process that has imported Megatron once.

python -m tests.support.rank_server

A line of standard input asks for a launch: {"ranks": N, "module": what each rank runs, as with
`python -m`, "arguments": the module's, "forks": whether it forks runs itself, "output": file for
the output of all ranks, "timeout": seconds}. A line of standard output answers it: {"returncode":
0, or 1 if a rank failed, "timed_out": whether it failed because of the time}. The server ends when
its input does.

Ranks are forked, so that they need not import what every launch needs. Otherwise they get what
torchrun gives its ranks: their environment variables, and a store in a process that outlives them.
As with torchrun, all ranks end when the launch ends or one of them fails.
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
_PATIENCE = 10  # seconds for ranks to end after another one has failed


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What an import prints must not be taken for an answer.
    _import()
    # Otherwise a garbage collection would touch, and so copy, the memory that all ranks share.
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_launch(answers, **json.loads(line))), file=answers)


def _import() -> None:
    """Import everything that would take each rank long, and make the mock data small."""
    from kvshift_megatron import cpu

    cpu.enable()
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt

    # The first optimizer of a process imports it.
    import torch._dynamo  # noqa: F401

    import tests.support.small_mock_data  # noqa: F401

    with contextlib.suppress(ImportError):  # for the entry point, which needs 0.19
        import megatron.core.models.mimo
        import megatron.core.tokenizers.text.libraries
        import megatron.training.training  # noqa: F401

        import kvshift_megatron.training.forward_step
        import kvshift_megatron.training.gpt_builder
        import kvshift_megatron.training.task  # noqa: F401

        _read_flags_once()


def _read_flags_once() -> None:
    """Keep what Megatron reads from its own sources for every parser: half of a short run."""
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
                # One process group, the first rank's, for all ranks and what they start.
                os.setpgid(0, running[0] if running else 0)
                _run_rank(rank, ranks, port, Path(output), **what)
            except BaseException:
                with open(output, "a") as file:
                    traceback.print_exc(file=file)
            finally:
                os._exit(1)  # a rank must never go on as a server
        running.append(child)
        with contextlib.suppress(PermissionError):  # it has ended already
            os.setpgid(child, running[0])
    # After the forks, as it has threads.
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


def _run_rank(
    rank: int, ranks: int, port: int, output: Path, module: str, arguments: list[str], forks: bool
) -> NoReturn:
    """Run as a rank, then end the process."""
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
