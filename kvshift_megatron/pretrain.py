"""Pretrain a KV-shifting GPT with Megatron's own training loop.

    torchrun --nproc-per-node 8 -m kvshift_megatron.pretrain <Megatron's flags> [--kv-shift-* flags]

Takes all of Megatron's flags, and adds the `--kv-shift-*` group, `--no-kv-shift` for the baseline
model, and `--task-module` for other data and validation metrics. The same command runs on a machine
without a GPU. Needs megatron-core 0.19; on 0.17 and 0.18 use the layer specs in your own script.
"""

import sys
import time

from kvshift_megatron import cpu
from kvshift_megatron.training import metrics
from kvshift_megatron.training.run_config import (
    check_implementation,
    configurations,
    parse_and_check,
)


def main() -> None:
    """Run `megatron.training.pretrain` with this process's command line.

    A mistake on the command line ends every rank with one sentence on standard error and exit
    code 1, before anything is built.
    """
    program_start = time.time()
    try:
        # Before parsing: without a GPU it also adds the flags that a CPU needs.
        cpu.enable()
        args = parse_and_check()
        check_implementation(args)
        metrics.log_more(args)
        config, run = configurations(args)
    except ValueError as error:
        sys.exit(f"kvshift_megatron: {error}")

    import torch
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps

    from kvshift_megatron.training.faults.guard import Guard
    from kvshift_megatron.training.forward_step import ForwardStep
    from kvshift_megatron.training.stages import embedding_ranks
    from kvshift_megatron.training.task import load_task
    from kvshift_megatron.upstream import dataset_helpers

    dataset_helpers.use_built()
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    task = load_task(args.task_module)
    # Tell Megatron to call the provider on every rank; it builds data only on those that read it.
    task.datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # of a function
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    with Guard(args) as guard, metrics.watch(args, config):
        pretrain(
            run,
            task.datasets_provider,
            ModelType.encoder_or_decoder,
            guard.of(ForwardStep(task)),
            store=store,
            get_embedding_ranks=embedding_ranks,
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
