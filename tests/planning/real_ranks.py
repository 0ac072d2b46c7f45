"""Run several real runs on the ranks of one launch, with the imports done once.

torchrun --nproc-per-node N ... -m tests.planning.real_ranks CASES.json

CASES.json: {name: {"ranks": how many of the N, "command": flags}}. Each run leaves rank-R.json (see
real_run.py) and rank-R.log in a folder beside CASES.json that has the run's name.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch

from kvshift_megatron import cpu
from tests.support.forked_process import run_and_exit


def main(cases: Path) -> None:
    cpu.enable()
    # The forked runs inherit these imports.
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.libraries
    import megatron.training.training  # noqa: F401

    from tests.planning import real_run

    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    for name, case in json.loads(cases.read_text()).items():
        folder = cases.with_name(name)
        if rank == 0:
            folder.mkdir()
            with socket.create_server(("localhost", 0)) as server:
                store.set(name, str(server.getsockname()[1]))
        port = int(store.get(name))
        if rank >= case["ranks"]:
            continue
        child = os.fork()
        if child == 0:
            os.environ["WORLD_SIZE"] = str(case["ranks"])
            command = [str(folder), *case["command"]]
            run_and_exit(real_run.main, command, folder / f"rank-{rank}.log", port)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
