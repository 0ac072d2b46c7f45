"""One run of an entry point in a forked process, which ends with it."""

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
    """Run an entry point as a separate process would, and exit with its exit code.

    Args:
        run: The entry point, which takes its arguments from sys.argv.
        command: These arguments.
        log: File to which its output is appended.
        port: Of the run's own rendezvous, in which no other run has left keys.
        forks: Whether the entry point forks runs itself.
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
    # End the processes that Megatron has started for saving; they would outlive this one.
    multiprocessing.util._exit_function()
    # Not sys.exit: exit handlers of the parent, such as pytest's, must not run in the child.
    os._exit(code)


def _fork_results_queue() -> None:
    """Fork the process in which Megatron collects what it has written.

    Do so before there are threads. A spawned process would take seconds to import torch.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue(mp_mode="fork")
