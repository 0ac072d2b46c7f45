"""Run kvshift_megatron.pretrain several times on one rank, importing everything once.

torchrun --nproc-per-node 1 ... -m tests.support.forked_runs PLAN.json

PLAN.json: {name: command line}. Next to it each run leaves NAME.log (its output), NAME.json (its
losses, as from record_losses.py) and NAME.exit (its exit code).
"""

import json
import os
import socket
import sys
from pathlib import Path

from kvshift_megatron import cpu
from tests.integration import record_losses
from tests.support.forked_process import run_and_exit


def main(plan: Path) -> None:
    cpu.enable()
    # Every run inherits these imports.
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.libraries
    import megatron.training.training  # noqa: F401

    import kvshift_megatron.training.forward_step
    import kvshift_megatron.training.gpt_builder
    import kvshift_megatron.training.task  # noqa: F401

    for name, command in json.loads(plan.read_text()).items():
        child = os.fork()
        if child == 0:
            with socket.create_server(("localhost", 0)) as server:
                port = server.getsockname()[1]
            output = plan.parent / name
            command = [str(output.with_suffix(".json")), *command]
            run_and_exit(record_losses.main, command, output.with_suffix(".log"), port)
        _, status = os.waitpid(child, 0)
        plan.with_name(f"{name}.exit").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
