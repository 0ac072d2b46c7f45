"""Give command lines to the entry point, up to where Megatron would start.

python -m tests.training.flags_worker PLAN.json ENDINGS.json [--without-checks]

PLAN.json: {name: [number of ranks, command line]}. ENDINGS.json: {name: [exit code, output]}.
"""

import contextlib
import functools
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

from kvshift_megatron import cpu
from kvshift_megatron.cpu import flags
from kvshift_megatron.training import run_config
from tests.support.forked_process import run_and_exit

# With this word nothing is checked, to show what the checks are for.
WITHOUT = "--without-checks"
CHECKS = ("check_ranges", "check_relations")


def start() -> None:
    """Do what `pretrain.main` does before it starts training."""
    try:
        cpu.enable()
        args = run_config.parse_and_check()
        run_config.check_implementation(args)
        run_config.configurations(args)
    except ValueError as error:
        sys.exit(f"kvshift_megatron: {error}")


def ending(ranks: int, command: list[str]) -> tuple[int, str]:
    """Start one command line in a forked process; return its exit code and its output."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
            run_and_exit(start, command, Path(log.name), port=0, forks=True)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), log.read()


def main(plan: Path, endings: Path, *words: str) -> None:
    cpu.enable()
    # Every process inherits these imports and the parser's texts.
    import megatron.core.models.mimo
    import megatron.core.tokenizers.text.libraries
    import megatron.training.training  # noqa: F401

    import kvshift_megatron.checks.model
    import kvshift_megatron.training.gpt_builder  # noqa: F401
    from kvshift_megatron.training import megatron_answers

    inspect.getsource = functools.cache(inspect.getsource)
    flags.megatron_actions()
    if WITHOUT in words:
        for check in CHECKS:
            setattr(run_config, check, lambda args: None)
        megatron_answers.in_one_sentence = contextlib.nullcontext
    cases = json.loads(plan.read_text())
    found = {name: ending(ranks, command) for name, (ranks, command) in cases.items()}
    endings.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
