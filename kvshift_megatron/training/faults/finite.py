"""Check the one step in which Megatron does not look for losses and gradients that are not finite.

Megatron 0.19 checks every step of a process except the first, and may save a checkpoint of weights
that are all NaN after it. That step is checked here, under the same flag
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

# Indices into the tuple that Megatron's train_step returns.
_SKIPPED, _GRAD_NORM = 1, 5
_ENDED_BY_MEGATRON = {
    16: "repeating the step gave the same result, so suspect the data or the weights and not the "
    "device; the state before the step was saved, and a restart repeats the step "
    "(--iterations-to-skip skips it)",
    17: "repeating the step gave another result, or the same one on another device; no checkpoint "
    "was saved",
}


def install() -> None:
    """End the run if the gradient of this process's first step is not finite."""
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
    """Return a forward step that checks the loss as long as Megatron does not.

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
            "process: the run ends before it saves a checkpoint; check the data and the checkpoint "
            "that it started from"
        )


def _this_rank() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def explain(exit_code: object) -> None:
    """Print, on the rank that failed Megatron's checks, in which iteration they ended the run."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    failed = getattr(get_rerun_state_machine(), "failed_validation_call", None)
    if exit_code in _ENDED_BY_MEGATRON and failed is not None:
        print(
            f"kvshift_megatron: ERROR: {_this_rank()} ended the run in iteration {iteration()} "
            f"({failed.caller.message}): {_ENDED_BY_MEGATRON[exit_code]}",
            file=sys.stderr,
            flush=True,
        )
