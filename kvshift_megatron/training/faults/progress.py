"""What this rank is doing, for the thread that watches it: a few assignments a step."""

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from kvshift_megatron.arguments import megatron_args

# Where a stretch without a sign of progress ends the run; elsewhere it may be as long as it takes.
TIMED = ("training", "evaluating")
FIRST_STEP = "in the first step"
_FRAMES = 12  # innermost, of a stack that is shown


class Progress:
    """Signs of progress of the main thread.

    Attributes:
        phase: in words.
        since: when the last sign was left, by time.monotonic().
        saved: iteration of the newest complete checkpoint of this process; None before the first.
    """

    def __init__(self) -> None:
        self.phase = "setting up"
        self.since = time.monotonic()
        self.saved: int | None = None
        self._first: int | None = None

    def mark(self, phase: str) -> None:
        self.phase = phase
        self.since = time.monotonic()

    @contextlib.contextmanager
    def entering(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.mark(phase)
        try:
            yield
        finally:
            self.mark(before)

    def of(self, forward_step: Callable) -> Callable:
        """A forward step of Megatron's loop that leaves a sign of progress."""

        def marked_forward_step(data_iterator: Any, model: Any) -> Any:
            now = iteration()
            if self._first is None:
                self._first = now
            # The first step compiles and connects: it has no usual length.
            is_first = now == self._first
            self.mark(
                "evaluating" if not model.training else FIRST_STEP if is_first else "training"
            )
            return forward_step(data_iterator, model)

        return marked_forward_step

    def newest_saved(self) -> int:
        """Iteration of the checkpoint that a restart goes on from; 0 where there is none."""
        loaded = getattr(megatron_args(), "iteration", None) or 0
        return loaded if self.saved is None else self.saved


def iteration() -> int | None:
    """The one under way, counted from 1; None before the first."""
    current = getattr(megatron_args(), "curr_iteration", None)
    return None if current is None else current + 1


def is_communicating(frame: FrameType | None) -> bool:
    """Whether a thread is in a call of torch.distributed, and so waits for others."""
    while frame is not None:
        filename = frame.f_code.co_filename.replace("\\", "/")
        # Over NCCL a pipeline's stages wait for the GPU, not in torch.distributed.
        if "/torch/distributed/" in filename or filename.endswith("/p2p_communication.py"):
            return True
        frame = frame.f_back
    return False


def stack(frame: FrameType | None) -> str:
    """The innermost frames, the last call last."""
    return "".join(traceback.format_stack(frame)[-_FRAMES:])
