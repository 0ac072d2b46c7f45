"""Pretrain a KV-shifting GPT with Megatron's own training loop.

    torchrun --nproc-per-node 8 -m kvshift_megatron.pretrain <Megatron's flags> [--kv-shift-* flags]

All of Megatron's flags are Megatron's; this adds the `--kv-shift-*` group, `--no-kv-shift` for the
vanilla twin, and `--task-module` for other data and validation metrics. The same command runs on a
machine without a GPU. Needs megatron-core 0.19; on 0.17 and 0.18 use the layer specs in a script of
your own.
"""

import argparse
import sys
import time
from argparse import Namespace

from kvshift_megatron import cpu
from kvshift_megatron.arguments import (
    add_kv_shift_args,
    add_vanilla_twin_arg,
    kv_shift_config_from_args,
)
from kvshift_megatron.training import metrics
from kvshift_megatron.training.faults.fault_flags import add_faults_args, check_faults_args


def main() -> None:
    """Run `megatron.training.pretrain` on this process's command line.

    A user's mistake ends every rank with one sentence on standard error and exit code 1, before
    anything is built.
    """
    program_start = time.time()
    try:
        # Also adds the flags that a CPU needs, when Megatron parses the command line.
        cpu.enable()
        args = _parse_and_check()
    except ValueError as error:
        sys.exit(f"kvshift_megatron: {error}")

    import torch
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from kvshift_megatron.training.faults.guard import Guard
    from kvshift_megatron.training.forward_step import TrainingStep
    from kvshift_megatron.training.task import embedding_ranks, load_task
    from kvshift_megatron.upstream import dataset_helpers

    dataset_helpers.use_built()
    set_startup_timestamps(program_start=program_start, main_entry=time.time())
    task = load_task(args.task_module)
    # Megatron builds the data on some ranks only where the provider says that it can tell which.
    task.datasets_provider.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    config = _model_config(args)
    with Guard(args) as guard, metrics.watch(args, config):
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            task.datasets_provider,
            ModelType.encoder_or_decoder,
            guard.of(TrainingStep(task)),
            store=store,
            get_embedding_ranks=embedding_ranks,
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _parse_and_check() -> Namespace:
    """Megatron's arguments, refused in this package's words first, then validated in Megatron's."""
    try:
        from megatron.training.arguments import parse_and_validate_args, parse_args
    except ImportError as error:
        raise ValueError(
            "this entry point needs megatron-core 0.19 (use kvshift_megatron.layer_specs in your "
            f"own script on older releases): {error}"
        ) from error
    from kvshift_megatron.attention.validation import check_args, check_transformer_config
    from kvshift_megatron.training.faults.fallback import settle_checkpoint
    from kvshift_megatron.training.task import load_task

    def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_faults_args(metrics.add_watching_args(parser))
        add_vanilla_twin_arg(add_kv_shift_args(parser)).add_argument(
            "--task-module",
            default=None,
            metavar="MODULE",
            help="Importable module with datasets and validation metrics of its own, as "
            "kvshift_megatron.training.task describes. Default: Megatron's GPT datasets.",
        )
        # The task's own flags have to be known before the command line can be parsed.
        known, _ = parser.parse_known_args()
        return load_task(known.task_module).add_args(parser)

    if "--kv-shift" in sys.argv:
        raise ValueError("kv_shift: this entry point shifts without being asked: drop --kv-shift")
    args = parse_args(add_args)
    if args.yaml_cfg is not None:
        raise ValueError(
            "yaml_cfg replaces the flags of KV shifting too: use flags, not --yaml-cfg"
        )
    if args.spec is not None:
        raise ValueError(
            "spec: this entry point chooses the layer itself: drop --spec, or apply "
            "kvshift_megatron.layer_specs.with_kv_shift to it in a script of your own"
        )
    if args.hybrid_layer_pattern is not None:
        raise ValueError(
            "hybrid_layer_pattern: this entry point trains GPT models: run Megatron-LM's "
            "pretrain_hybrid.py with --spec kvshift_megatron.static_specs hybrid_stack_spec"
        )
    if args.use_cpu_initialization and not (cpu.is_enabled() or args.use_torch_fsdp2):
        raise ValueError(
            "use_cpu_initialization: Megatron leaves a model that it builds on the CPU there: drop "
            "--use-cpu-initialization"
        )
    check_args(args)
    metrics.check_watching_args(args)
    check_faults_args(args)
    if kv_shift_config_from_args(args) is not None:
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        check_transformer_config(Namespace(**{**vars(args), "num_query_groups": groups}))
    settle_checkpoint(args)
    return parse_and_validate_args(add_args)


def _model_config(args: Namespace):
    """Megatron's GPT configuration with the taps that were asked for."""
    from megatron.training.argument_utils import gpt_config_from_args

    from kvshift_megatron.checks.model import report_after_build
    from kvshift_megatron.training.gpt_builder import KVShiftGPTModelConfig

    config = gpt_config_from_args(args, model_config_cls=KVShiftGPTModelConfig)
    config.kv_shift = kv_shift_config_from_args(args)
    report_after_build(config, config.kv_shift)
    return config


if __name__ == "__main__":
    main()
