"""Several runs of kvshift_megatron.pretrain on the ranks of one launch, imports done once.

torchrun --nproc-per-node N ... -m tests.integration.forked_ranks PLAN.json

PLAN.json: {name: {"command": command line, "before": [damage, its arguments...] or null}}, damage
being a function of damaged_checkpoints.py. Beside it each rank of each run leaves NAME-RANK.log
(what it printed) and NAME-RANK.exit (its exit code; -9 if it did not end by itself).
"""

import json
import multiprocessing.util
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from kvshift_megatron import cpu, pretrain
from tests.integration import damaged_checkpoints

_SECONDS = 120  # for one run; the longest takes a few


def main(plan: Path) -> None:
    cpu.enable()
    # Every run inherits what is imported here.
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.libraries
    import megatron.training.training  # noqa: F401

    import kvshift_megatron.gpt_builder
    import kvshift_megatron.training_step
    import kvshift_megatron.training_task  # noqa: F401

    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    for name, run in json.loads(plan.read_text()).items():
        if rank == 0:
            if run["before"]:
                damage, *arguments = run["before"]
                getattr(damaged_checkpoints, damage)(*map(Path, arguments))
            # A rendezvous of its own, which no other run has left keys in.
            with socket.create_server(("localhost", 0)) as server:
                store.set(name, str(server.getsockname()[1]))
        port = store.get(name).decode()
        child = os.fork()
        if child == 0:
            _run(plan.with_name(f"{name}-{rank}.log"), port, run["command"])
        plan.with_name(f"{name}-{rank}.exit").write_text(str(_wait(child)))


def _run(log: Path, port: str, command: list[str]) -> None:
    """One rank of one run, in a process of its own; does not return."""
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv[1:] = command
    code = 0
    try:
        pretrain.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        print(error, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Ends the processes that Megatron has started to save; they would outlive this one.
    multiprocessing.util._exit_function()
    # What ends the parent, such as its launcher's handlers, is not the child's to run.
    os._exit(code)


def _wait(child: int) -> int:
    """The exit code of a child process, which gets no more than its time."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


if __name__ == "__main__":
    main(Path(sys.argv[1]))
