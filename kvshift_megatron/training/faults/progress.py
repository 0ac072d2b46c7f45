"""What this rank is doing, for the thread that watches it; costs a few assignments per step."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from kvshift_megatron.arguments import megatron_args

# The phases in which too long a time without progress ends the run; others have no limit.
TIMED = ("training", "evaluating")
FIRST_STEP = "in the first step"
_FRAMES = 12  # innermost frames of a stack that are shown


class Progress:
    """Signs of progress of the main thread.

    Attributes:
        phase: In words.
        since: Time of the last sign of progress, by time.monotonic().
        saved: Iteration of the last checkpoint that this process completed; None before the first.
    """

    def __init__(self) -> None:
        self.phase = "setting up"
        self.since = time.monotonic()
        self.saved: int | None = None
        self._first: int | None = None

    def mark(self, phase: str) -> None:
        """Leave a sign of progress."""
        self.phase = phase
        self.since = time.monotonic()

    @contextlib.contextmanager
    def entering(self, phase: str) -> Iterator[None]:
        """Be in a phase for the length of a block."""
        before = self.phase
        self.mark(phase)
        try:
            yield
        finally:
            self.mark(before)

    def of(self, forward_step: Callable) -> Callable:
        """Wrap Megatron's forward step to leave a sign of progress."""

        def marked_forward_step(data_iterator: Any, model: Any) -> Any:
            now = iteration()
            if self._first is None:
                self._first = now
            # The first step compiles and connects, so its length is hard to predict.
            is_first = now == self._first
            self.mark(
                "evaluating" if not model.training else FIRST_STEP if is_first else "training"
            )
            return forward_step(data_iterator, model)

        return marked_forward_step

    def latest_saved(self) -> int:
        """Return the iteration from which a restart continues; 0 if nothing was saved."""
        loaded = getattr(megatron_args(), "iteration", None) or 0
        return loaded if self.saved is None else self.saved


def iteration() -> int | None:
    """Return the current iteration, counted from 1; None before the first."""
    current = getattr(megatron_args(), "curr_iteration", None)
    return None if current is None else current + 1


def is_communicating(frame: FrameType | None) -> bool:
    """Return whether a thread is in a call of torch.distributed, and so waits for other ranks."""
    while frame is not None:
        filename = frame.f_code.co_filename.replace("\\", "/")
        # With NCCL, pipeline stages wait for the GPU and not in torch.distributed.
        if "/torch/distributed/" in filename or filename.endswith("/p2p_communication.py"):
            return True
        frame = frame.f_back
    return False


def stack(frame: FrameType | None) -> str:
    """Return the innermost frames, most recent call last."""
    return "".join(traceback.format_stack(frame)[-_FRAMES:])
