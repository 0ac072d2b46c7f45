"""The protections around Megatron's training while it runs."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from kvshift_megatron.training.faults import agreement, finite, hashes, processes
from kvshift_megatron.training.faults.fault_flags import hang_timeout
from kvshift_megatron.training.faults.progress import Progress
from kvshift_megatron.training.faults.saving import Saves
from kvshift_megatron.training.faults.watch import Watch


class Guard:
    """Context manager around `megatron.training.pretrain`.

    A run that would end successfully although its last save failed ends with an error and exit
    code 1 instead.

    Args:
        args: Megatron's, validated.
    """

    def __init__(self, args: Namespace):
        self._progress = Progress()
        self._saves = Saves(args.on_save_failure == "continue", self._progress)
        self._saves.install()
        finite.install()
        hashes.install()
        self._watch = None
        timeout = hang_timeout(args)
        if timeout:
            store = agreement.store(timedelta(minutes=args.distributed_timeout_minutes))
            rank = int(os.environ.get("RANK", "0"))
            self._watch = Watch(store, rank, args.world_size, timeout, self._progress)

    def of(self, forward_step: Callable) -> Callable:
        """Wrap Megatron's `forward_step_func` to report progress and check the loss."""
        return self._progress.of(finite.of(forward_step))

    def __enter__(self) -> "Guard":
        if self._watch is not None:
            self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is not None:
            self._watch.stop()
        if isinstance(error, SystemExit):
            finite.explain(error.code)
        # Megatron's loop ends with sys.exit(0) at an exit interval or signal.
        is_success = error is None or (isinstance(error, SystemExit) and not error.code)
        if not is_success:
            processes.abandon()
        if is_success and self._saves.unsaved is not None:
            if os.environ.get("RANK", "0") == "0":
                message = f"kvshift_megatron: ERROR: {self._saves.unsaved}"
                print(message, file=sys.stderr, flush=True)
            sys.exit(1)
