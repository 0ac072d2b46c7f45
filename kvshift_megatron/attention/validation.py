"""Refuse the settings and calls that KV shifting cannot honour.

Each refusal names the setting and what to do instead. Settings (Megatron's arguments and the
transformer configuration) are checked at start, by every KV-shifting layer before it creates
parameters; calls are checked as they come.
"""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from kvshift_megatron.arguments import megatron_args
from kvshift_megatron.upstream import probe

if TYPE_CHECKING:
    # Not at run time: some commands check flags without importing Megatron.
    from megatron.core.transformer.transformer_config import TransformerConfig

# Setting -> what is wrong with it and what to do instead.
_REFUSED_IN_CONFIG = {
    "multi_latent_attention": "has no per-head keys and values to shift: drop "
    "--multi-latent-attention, or train without KV shifting",
    "fused_single_qkv_rope": "rotates query and key before they are split, and the shift must come "
    "before the rotation: drop --fused-single-qkv-rope",
    "flash_decode": "keeps no raw last key and value, which KV shifting needs: drop --flash-decode",
    "experimental_attention_variant": "contains no self-attention to shift: drop "
    "--experimental-attention-variant",
}
_REFUSED_ARGS = {
    "reset_attention_mask": "hides document boundaries in a mask that the shift does not see, "
    "so keys and values would cross document boundaries: use packed sequences instead "
    "(--dataloader-inter-document-masking or --sft) and drop --reset-attention-mask",
    "hybrid_context_parallel": "changes the context-parallel group from batch to batch, which KV "
    "shifting does not follow: drop --hybrid-context-parallel",
}


def check_at_start(config: "TransformerConfig") -> None:
    """Raise ValueError for a setting or a Megatron that KV shifting cannot honour.

    Every KV-shifting layer calls this before it creates parameters, so every way of building a
    model goes through it. It checks Megatron's arguments too, if its scripts have set them.

    Args:
        config: The model's configuration.
    """
    probe.check_release(probe.ATTENTION)
    check_transformer_config(config)
    args = megatron_args()
    if args is not None:
        check_args(args)


def check_transformer_config(config: "TransformerConfig | Namespace") -> None:
    """Raise ValueError for a model configuration that KV shifting cannot honour.

    Args:
        config: A TransformerConfig, or Megatron's arguments, which use the same names. A missing
            field counts as off.
    """
    groups, tp = config.num_query_groups, config.tensor_model_parallel_size
    if groups is None:
        raise ValueError(
            "num_attention_heads is not set: give --num-attention-heads and the model's other "
            "sizes, or --use-checkpoint-args with a checkpoint that holds them"
        )
    if groups % tp and tp % groups:
        raise ValueError(
            f"num_query_groups={groups} and tensor_model_parallel_size={tp}: one must divide the "
            "other, so that a rank holds whole query groups, or whole ranks share one; change "
            "--num-query-groups or --tensor-model-parallel-size"
        )
    _refuse(config, _REFUSED_IN_CONFIG)


def check_args(args: Namespace) -> None:
    """Raise ValueError for a training argument that KV shifting cannot honour.

    This covers what a layer cannot see in its configuration, such as how samples are cut.

    Args:
        args: Megatron's arguments. A flag that the release lacks counts as off.
    """
    _refuse(args, _REFUSED_ARGS)
    is_packed = any(
        getattr(args, name, False) for name in ("sft", "dataloader_inter_document_masking")
    )
    if is_packed and getattr(args, "overlap_moe_expert_parallel_comm", False):
        raise ValueError(
            "overlap_moe_expert_parallel_comm with packed documents: Megatron's schedule plan does "
            "not pass the documents' bounds to the layers, so keys and values would cross "
            "them: drop --overlap-moe-expert-parallel-comm, or train without packing"
        )
    if getattr(args, "spec", None) is not None and getattr(args, "mtp_num_layers", None):
        raise ValueError(
            f"mtp_num_layers={args.mtp_num_layers} with spec: Megatron builds the layers of "
            "multi-token prediction from its own specs, so they would silently be vanilla: drop "
            "--spec and use `python -m kvshift_megatron.pretrain`, or a patched Megatron-LM with "
            "--kv-shift"
        )
    if is_packed and args.pipeline_model_parallel_size > 1 and (args.micro_batch_size or 1) > 1:
        raise ValueError(
            f"micro_batch_size={args.micro_batch_size} with packed documents and pipeline "
            "parallelism: Megatron packs the samples into one, but its stages expect separate "
            "ones; set --micro-batch-size 1"
        )
    ranks = args.context_parallel_size
    if ranks > 1 and getattr(args, "sft", False) and not _has_transformer_engine():
        raise ValueError(
            f"sft with context_parallel_size={ranks}: Megatron cuts the documents over the ranks "
            "with a kernel of Transformer Engine, which is not installed: install it, or set "
            "--context-parallel-size 1"
        )
    if ranks > 1 and getattr(args, "dataloader_inter_document_masking", False):
        raise ValueError(
            f"dataloader_inter_document_masking with context_parallel_size={ranks} splits the "
            "whole stream over the ranks, but packed attention and the shift expect each document "
            "to be split separately: set --context-parallel-size 1, or drop "
            "--dataloader-inter-document-masking"
        )


def _has_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE


def _refuse(settings: "TransformerConfig | Namespace", refusals: dict[str, str]) -> None:
    for name, sentence in refusals.items():
        value = getattr(settings, name, None)
        if value:
            shown = name if value is True else f"{name}={value!r}"
            raise ValueError(f"{shown} {sentence}")


def refuse_call(
    packed_seq_params: Any = None,
    inference_context: Any = None,
    inference_params: Any = None,
    **_: Any,
) -> None:
    """Raise ValueError for a forward call that KV shifting cannot honour yet."""
    if getattr(packed_seq_params, "local_cp_size", None) is not None:
        raise ValueError(
            "local_cp_size: the batch has its own context-parallel group (hybrid context "
            "parallelism), which KV shifting does not follow: drop --hybrid-context-parallel"
        )
    if inference_context is not None or inference_params is not None:
        raise ValueError(
            "inference_context: Megatron's KV cache drops the last raw key and value, which KV "
            "shifting needs for the next token; score whole sequences without a context instead"
        )
