"""Run kvshift_megatron.pretrain several times on the ranks of one launch, importing once.

torchrun --nproc-per-node N ... -m tests.support.forked_ranks PLAN.json

PLAN.json: {name: {"command": command line, "before": [damage, its arguments...] or null}}; damage
is a function of damaged_checkpoints.py. Next to it each rank of each run leaves NAME-RANK.log (its
output) and NAME-RANK.exit (its exit code; -9 if it did not end by itself).
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from kvshift_megatron import cpu, pretrain
from tests.integration import damaged_checkpoints
from tests.support.forked_process import run_and_exit

_SECONDS = 120  # for one run; the longest takes a few


def main(plan: Path) -> None:
    cpu.enable()
    # Every run inherits these imports.
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.libraries
    import megatron.training.training  # noqa: F401

    import kvshift_megatron.training.forward_step
    import kvshift_megatron.training.gpt_builder
    import kvshift_megatron.training.task  # noqa: F401

    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    for name, run in json.loads(plan.read_text()).items():
        if rank == 0:
            if run["before"]:
                damage, *arguments = run["before"]
                getattr(damaged_checkpoints, damage)(*map(Path, arguments))
            with socket.create_server(("localhost", 0)) as server:
                store.set(name, str(server.getsockname()[1]))
        port = int(store.get(name))
        child = os.fork()
        if child == 0:
            log = plan.with_name(f"{name}-{rank}.log")
            run_and_exit(pretrain.main, run["command"], log, port)
        plan.with_name(f"{name}-{rank}.exit").write_text(str(_wait(child)))


def _wait(child: int) -> int:
    """Return the exit code of a child process, which is killed after its time."""
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
