"""Turn the command line of `kvshift_megatron.pretrain` into Megatron's arguments and configuration.

For the pretraining entry point and for the planner, which runs the same steps without GPUs.
"""

import argparse
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from kvshift_megatron import cpu
from kvshift_megatron.arguments import (
    add_baseline_arg,
    add_kv_shift_args,
    kv_shift_config_from_args,
)
from kvshift_megatron.training import metrics
from kvshift_megatron.training.faults.fault_flags import add_faults_args, check_faults_args
from kvshift_megatron.training.flag_ranges import check_ranges
from kvshift_megatron.training.flag_relations import check_relations
from kvshift_megatron.upstream import probe
from kvshift_megatron.utils.any_help import AnyHelpFormatter

if TYPE_CHECKING:
    # Not at run time: it imports Megatron, which on a CPU must wait for `cpu.enable()`.
    from megatron.training.config import PretrainConfigContainer

    from kvshift_megatron.training.gpt_builder import KVShiftGPTModelConfig


def parse_and_check() -> Namespace:
    """Parse sys.argv, refuse what KV shifting cannot honour, then validate as Megatron does.

    Raises:
        ValueError: A flag, or a combination, cannot be honoured; or megatron-core is too old, or so
            new that what is replaced there has changed.
    """
    try:
        from megatron.training.arguments import parse_and_validate_args, parse_args
    except ImportError as error:
        raise ValueError(
            "this entry point needs megatron-core 0.19 (use kvshift_megatron.layer_specs in your "
            f"own script on older releases): {error}"
        ) from error
    parts = (probe.ATTENTION, probe.ENTRY_POINT)
    probe.check_release(*parts, *([probe.CPU_LAYER] if cpu.is_enabled() else []))
    from kvshift_megatron.training.checkpoint_args import finished, take_the_rest
    from kvshift_megatron.training.faults.places import check_places
    from kvshift_megatron.training.faults.settle import settle_checkpoint
    from kvshift_megatron.training.megatron_answers import in_one_sentence

    if "--kv-shift" in sys.argv:
        raise ValueError("kv_shift: this entry point shifts by default: drop --kv-shift")
    with in_one_sentence():
        args = parse_args(_add_args)
    _check_flags(args)
    check_places(args)
    settle_checkpoint(args)
    # Once more, as it may have added a flag that names another checkpoint.
    args, saved = finished(parse_args(_add_args) if args.use_checkpoint_args else args)
    _check_model(args)
    with in_one_sentence():
        args = parse_and_validate_args(_add_args)
    take_the_rest(args, saved)
    return args


def _add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this package's flags, then those of the task that --task-module names."""
    from kvshift_megatron.training.task import load_task

    parser.formatter_class = AnyHelpFormatter
    add_faults_args(metrics.add_watching_args(parser))
    add_baseline_arg(add_kv_shift_args(parser)).add_argument(
        "--task-module",
        default=None,
        metavar="MODULE",
        help="Importable module with its own datasets and validation metrics, as described in "
        "kvshift_megatron.training.task. Default: Megatron's GPT datasets.",
    )
    # Parse --task-module first: the task's own flags must be known before the rest is parsed.
    known, _ = parser.parse_known_args()
    # The one format of which Megatron keeps hashes.
    parser.set_defaults(verify_integrity=known.ckpt_format == "torch_dist")
    return load_task(known.task_module).add_args(parser)


def _check_flags(args: Namespace) -> None:
    """Raise ValueError for a flag that cannot be honoured, whatever the model is."""
    if args.yaml_cfg is not None:
        raise ValueError("yaml_cfg replaces KV shifting's flags too: use flags, not --yaml-cfg")
    if args.spec is not None:
        raise ValueError(
            "spec: this entry point chooses the layer itself: drop --spec, or apply "
            "kvshift_megatron.layer_specs.with_kv_shift to it in your own script"
        )
    metrics.check_watching_args(args)
    check_faults_args(args)
    check_ranges(args)


def _check_model(args: Namespace) -> None:
    """Raise ValueError for a model that cannot be trained.

    Args:
        args: Megatron's, with what it takes from a checkpoint.
    """
    from kvshift_megatron.attention.validation import check_args, check_transformer_config
    from kvshift_megatron.specs.hybrid_pattern import num_layers, pattern_in
    from kvshift_megatron.training.megatron_answers import in_one_sentence

    if args.use_cpu_initialization and not (cpu.is_enabled() or args.use_torch_fsdp2):
        raise ValueError(
            "use_cpu_initialization: Megatron leaves a model that it builds on the CPU there: drop "
            "--use-cpu-initialization"
        )
    if pattern := pattern_in(args):
        with in_one_sentence():
            layers = num_layers(pattern)
        args = Namespace(**{**vars(args), "num_layers": layers, "hybrid_layer_pattern": pattern})
    check_args(args)
    check_ranges(args)
    if kv_shift_config_from_args(args) is not None:
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        check_transformer_config(Namespace(**{**vars(args), "num_query_groups": groups}))
    check_relations(args)


def check_implementation(args: Namespace) -> None:
    """Refuse an implementation of the shift that is asked for by name and cannot run here.

    Raises:
        ValueError: KVSHIFT_IMPLEMENTATION does not exist, or does not fit the device, the dtype or
            the window.
    """
    import torch

    from kvshift_megatron.attention.implementation import check_named

    kv_shift = kv_shift_config_from_args(args)
    if kv_shift is not None:
        dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
        check_named(cpu.is_enabled(), dtype, kv_shift.window)


def configurations(args: Namespace) -> "tuple[KVShiftGPTModelConfig, PretrainConfigContainer]":
    """Return the model's configuration, with the taps that `args` ask for, and that of the run.

    Args:
        args: From `parse_and_check`.

    Raises:
        ValueError: Megatron refuses the flags.
    """
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        hybrid_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from kvshift_megatron.checks.model import report_after_build
    from kvshift_megatron.stored.at_load import compare_at_load
    from kvshift_megatron.training.gpt_builder import KVShiftGPTModelConfig
    from kvshift_megatron.training.hybrid_builder import KVShiftHybridModelConfig
    from kvshift_megatron.training.megatron_answers import in_one_sentence

    with in_one_sentence():
        if args.hybrid_layer_pattern is None:
            config = gpt_config_from_args(args, model_config_cls=KVShiftGPTModelConfig)
        else:
            config = hybrid_config_from_args(args, model_config_cls=KVShiftHybridModelConfig)
        run = pretrain_cfg_container_from_args(args, config)
    config.kv_shift = kv_shift_config_from_args(args)
    report_after_build(config, config.kv_shift)
    # The baseline has no layer that does it.
    compare_at_load()
    return config, run
