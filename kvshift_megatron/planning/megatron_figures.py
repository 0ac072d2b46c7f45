"""Megatron's own figures of a run, to compare with what was counted."""

import contextlib
import copy
import io
from argparse import Namespace


def megatron_figures(args: Namespace) -> dict:
    """Evaluate Megatron's own formulas.

    Args:
        args: Megatron's validated arguments.

    Returns:
        megatron_flops_per_step: num_floating_point_operations of a global batch, all ranks
        together; megatron_state_bytes and megatron_activation_bytes: from its theoretical memory
        report, for the rank that holds most (the first stage), or None if Megatron reports none.
        Its activation formula is for full GPT layers in 16 bits, with attention kernels that keep
        no scores.
    """
    from megatron.training.theoretical_memory_usage import report_theoretical_memory
    from megatron.training.training import num_floating_point_operations

    # Both functions change the arguments they are given.
    args = copy.copy(args)
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    with contextlib.redirect_stdout(io.StringIO()):
        figures = report_theoretical_memory(args, num_microbatches=micro_batches)
        flops = num_floating_point_operations(args, args.global_batch_size)
    state, activations = figures[:2] if figures else (None, None)
    mebibyte = 1024 * 1024
    return {
        "megatron_flops_per_step": flops,
        "megatron_state_bytes": None if state is None else state * mebibyte,
        "megatron_activation_bytes": None if activations is None else activations * mebibyte,
    }
