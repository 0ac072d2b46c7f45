"""What Megatron itself says about a run, to stand beside what was counted."""

import contextlib
import copy
import io
from argparse import Namespace


def megatron_figures(args: Namespace) -> dict:
    """Megatron's own formulas.

    Args:
        args: validated.

    Returns:
        flops_per_step: num_floating_point_operations of a global batch, all ranks together;
        theoretical_state_bytes and theoretical_activation_bytes: of its theoretical memory report,
        for the rank that holds most (the first stage); its activation formula is for full GPT
        layers with attention kernels that keep no scores, in 16 bits.
    """
    from megatron.training.theoretical_memory_usage import report_theoretical_memory
    from megatron.training.training import num_floating_point_operations

    # Both write into what they are given.
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
