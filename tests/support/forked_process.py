"""What a forked copy of a test's process does: one run of an entry point, and nothing after it."""

import multiprocessing.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def run_and_exit(
    run: Callable[[], None], command: list[str], log: Path, port: int, forks: bool = False
) -> NoReturn:
    """Run an entry point as a process of its own would; its exit code is this process's.

    Args:
        run: takes its arguments from sys.argv.
        command: these arguments.
        log: file for everything that it prints, behind what others have printed there.
        port: of its own rendezvous, which no other run has left keys in.
        forks: whether the entry point forks runs of its own.
    """
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv[1:] = command
    if not forks:
        _fork_results_queue()
    code = 0
    try:
        run()
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
    # What ends the parent, such as its tests' or launcher's handlers, is not the child's to run.
    os._exit(code)


def _fork_results_queue() -> None:
    """Start now the process in which Megatron collects what it has written.

    Forked, and before there are threads: one that starts afresh takes seconds to import torch.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue(mp_mode="fork")
