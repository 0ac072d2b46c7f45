"""Losses and gradients that are not finite: Megatron's checks, and the step that they leave out.

Megatron 0.19 checks every step but the first of a process, after which it may save a checkpoint of
weights that are all NaN. That step is checked here, under the same flag
(`--no-check-for-nan-in-loss-and-grad`).
"""

import functools
import math
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from kvshift_megatron.training.faults.progress import iteration
from kvshift_megatron.upstream import faults_table, substitutions

# Places in what Megatron's train_step returns.
_SKIPPED, _GRAD_NORM = 1, 5
_ENDED_BY_MEGATRON = {
    16: "the same again when it was repeated, so that the data or the weights are at fault rather "
    "than the device; a checkpoint of the step before was saved, and a restart repeats the step "
    "(--iterations-to-skip leaves it out)",
    17: "something else when it was repeated, or the same on another device",
}


def install() -> None:
    """Have the first step of this process end the run if its gradient is not finite."""
    substitutions.apply(faults_table.step(_checked_step))


def _checked_step(original: Callable) -> Callable:
    @functools.wraps(original)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        is_unchecked = _is_unchecked()
        answer = original(*args, **kwargs)
        norm = answer[_GRAD_NORM]
        if is_unchecked and norm is not None and not answer[_SKIPPED]:
            _raise_unless_finite("the gradient norm of all ranks, seen by", float(norm))
        return answer

    return train_step


def of(forward_step: Callable) -> Callable:
    """Return a forward step of Megatron's loop that checks the loss while Megatron does not yet.

    Its loss function raises RuntimeError on the rank whose loss is not finite.
    """

    def checked_forward_step(data_iterator: Any, model: Any) -> Any:
        output, loss_function = forward_step(data_iterator, model)
        if model.training and _is_unchecked():
            loss_function = functools.partial(_checked_loss, loss_function)
        return output, loss_function

    return checked_forward_step


def _checked_loss(loss_function: Callable, *args: Any, **kwargs: Any) -> Any:
    answer = loss_function(*args, **kwargs)
    _raise_unless_finite("the loss of", answer[0].item())
    return answer


def _is_unchecked() -> bool:
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    is_wanted = get_args().check_for_nan_in_loss_and_grad
    return is_wanted and not get_rerun_state_machine().first_iteration_complete


def _raise_unless_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise RuntimeError(
            f"{what} {_this_rank()} is {value} in iteration {iteration()}, the first of this "
            "process: the run ends before the next checkpoint; look at the data and the checkpoint "
            "that it began from"
        )


def _this_rank() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def explain(exit_code: object) -> None:
    """Print in which iteration Megatron's checks ended the run, on the rank that failed them."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    failed = getattr(get_rerun_state_machine(), "failed_validation_call", None)
    if exit_code in _ENDED_BY_MEGATRON and failed is not None:
        print(
            f"kvshift_megatron: ERROR: {_this_rank()} ended the run in iteration {iteration()} "
            f"({failed.caller.message}): {_ENDED_BY_MEGATRON[exit_code]}",
            file=sys.stderr,
            flush=True,
        )
