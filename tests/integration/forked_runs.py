"""Several runs of kvshift_megatron.pretrain on one rank, one after the other, imports done once.

torchrun --nproc-per-node 1 ... -m tests.integration.forked_runs PLAN.json

PLAN.json: {name: command line}. Beside it each run leaves NAME.log (what it printed), NAME.json
(its losses, as record_losses.py) and NAME.exit (its exit code).
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

from kvshift_megatron import cpu
from tests.integration import record_losses


def main(plan: Path) -> None:
    cpu.enable()
    # Every run inherits what is imported here.
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.libraries
    import megatron.training.training  # noqa: F401

    import kvshift_megatron.gpt_builder
    import kvshift_megatron.training_step
    import kvshift_megatron.training_task  # noqa: F401

    for name, command in json.loads(plan.read_text()).items():
        child = os.fork()
        if child == 0:
            _run(plan.parent / name, command)
        _, status = os.waitpid(child, 0)
        plan.with_name(f"{name}.exit").write_text(str(os.waitstatus_to_exitcode(status)))


def _run(output: Path, command: list[str]) -> None:
    """One run in a process of its own, with a rendezvous of its own; does not return."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv[1:] = [str(output.with_suffix(".json")), *command]
    code = 0
    try:
        record_losses.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        print(error, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # What ends the parent, such as its tests' or launcher's handlers, is not the child's to run.
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
