"""A trial of the compiled kernel in a process, before it is first chosen there."""

import functools

import torch

from kvshift_megatron.ops.cpu import kernel
from kvshift_megatron.ops.trial import Trial, why_wrong


@functools.cache
def self_check(dtype: torch.dtype) -> str | None:
    """Return None if the kernel computes the right numbers, else a clause on what is wrong.

    Every version that the compiler has made for this dtype runs: both directions, stores in and
    past the caches, one thread and all of them.
    """
    trials = [
        Trial(
            functools.partial(kernel.forward, past_caches=past_caches),
            functools.partial(kernel.backward, past_caches=past_caches),
            packed=packed,
            # Enough tokens for all threads.
            repeats=4 if past_caches else 1,
            name="streamed" if past_caches else "",
        )
        for past_caches in (False, True)
        for packed in (False, True)
    ]
    return why_wrong("the compiled kernels of the shift", trials, torch.device("cpu"), dtype)
