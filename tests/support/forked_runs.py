"""Run kvshift_megatron.pretrain several times on one rank, importing everything once.

`run_plan` launches it: torchrun --nproc-per-node 1 ... -m tests.support.forked_runs PLAN.json

PLAN.json: {name: command line}. Next to it each run leaves NAME.log (its output), NAME.json (its
losses, as from record_losses.py) and NAME.exit (its exit code).
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from kvshift_megatron import cpu
from tests.integration import record_losses
from tests.support.forked_process import run_and_exit
from tests.support.launch import ranks


class Run(NamedTuple):
    code: int
    output: str
    losses: list[str]


def run_plan(directory: Path, plan: dict[str, list[str]]) -> dict[str, Run]:
    """Run command lines one after the other, in a folder that gets their files."""
    (directory / "plan.json").write_text(json.dumps(plan))
    launch = ranks(
        1,
        "tests.support.forked_runs",
        [str(directory / "plan.json")],
        timeout=400,
        forks=True,
        # Compiling takes longer than running a few steps.
        TORCHDYNAMO_DISABLE="1",
    )
    assert launch.returncode == 0, launch.stdout[-5000:]
    return {
        name: Run(
            int((directory / f"{name}.exit").read_text()),
            (directory / f"{name}.log").read_text(errors="replace"),
            json.loads((directory / f"{name}.json").read_text()),
        )
        for name in plan
    }


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
