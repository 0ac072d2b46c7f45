"""What KV shifting refuses, and in which words.

Each refusal names the setting and what to do instead. Three moments: Megatron's arguments (before
anything is built), the transformer configuration (when a layer is built), a call.
"""

from argparse import Namespace

from megatron.core.transformer.transformer_config import TransformerConfig

_PACKED = "packed sequences are not supported by KV shifting yet, as a key or value would cross a"


def check_transformer_config(config: TransformerConfig | Namespace) -> None:
    """Raise ValueError for a model configuration that KV shifting cannot honour.

    Called for every KV-shifting layer, before its parameters exist.

    Args:
        config: a TransformerConfig, or Megatron's arguments, whose names are the same; fields that
            one of them or a release lacks count as off.
    """
    groups, tp = config.num_query_groups, config.tensor_model_parallel_size
    if groups % tp and tp % groups:
        raise ValueError(
            f"num_query_groups={groups} and tensor_model_parallel_size={tp}: one must divide the "
            "other, so that each rank holds whole query groups or a group whole ranks; change "
            "--num-query-groups or --tensor-model-parallel-size"
        )
    if _on(config, "multi_latent_attention"):
        raise ValueError(
            "multi_latent_attention has no per-head keys and values to shift: drop "
            "--multi-latent-attention, or train without KV shifting"
        )
    if _on(config, "fused_single_qkv_rope"):
        raise ValueError(
            "fused_single_qkv_rope rotates query and key before they are split, and the shift must "
            "come before the rotation: drop --fused-single-qkv-rope"
        )
    if config.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size={config.context_parallel_size}: the token before a chunk lives "
            "on another rank, and KV shifting does not exchange it yet; set "
            "--context-parallel-size 1 (tensor and sequence parallelism shard long sequences too)"
        )
    if _on(config, "flash_decode"):
        raise ValueError(
            "flash_decode keeps no raw last key and value, which KV shifting needs: drop "
            "--flash-decode"
        )
    if _on(config, "experimental_attention_variant"):
        raise ValueError(
            f"experimental_attention_variant={config.experimental_attention_variant!r} contains no "
            "self-attention to shift: drop --experimental-attention-variant"
        )


def check_args(args: Namespace) -> None:
    """Raise ValueError for a training argument that KV shifting cannot honour.

    Covers what a layer cannot see in its configuration, such as how samples are cut.

    Args:
        args: Megatron's arguments; flags that a release lacks count as off.
    """
    if _on(args, "reset_attention_mask"):
        raise ValueError(
            "reset_attention_mask hides document boundaries in a mask that the shift does not see, "
            "so keys and values would leak across documents: drop --reset-attention-mask"
        )
    if _on(args, "sft"):
        raise ValueError(
            f"sft packs documents: {_PACKED} document boundary; train on unpacked samples "
            "(drop --sft)"
        )
    if _on(args, "dataloader_inter_document_masking"):
        raise ValueError(
            f"dataloader_inter_document_masking packs documents: {_PACKED} document boundary; drop "
            "--dataloader-inter-document-masking"
        )
    if _on(args, "mtp_num_layers"):
        raise ValueError(
            "mtp_num_layers: Megatron builds its multi-token-prediction layers from specs of its "
            "own, so that they would silently be vanilla: drop --mtp-num-layers"
        )
    if _on(args, "hybrid_context_parallel"):
        raise ValueError(
            "hybrid_context_parallel changes the context-parallel group from batch to batch, which "
            "KV shifting does not follow: drop --hybrid-context-parallel"
        )


def refuse_call(packed_seq_params=None, inference_context=None, inference_params=None, **_) -> None:
    """Raise ValueError for a forward call that KV shifting cannot honour yet."""
    if packed_seq_params is not None:
        raise ValueError(f"packed_seq_params: {_PACKED} document boundary; pass unpacked samples")
    if inference_context is not None or inference_params is not None:
        raise ValueError(
            "inference_context: Megatron's KV cache holds no raw last key and value, which KV "
            "shifting needs for the next token; score whole sequences without a context instead"
        )


def _on(settings: TransformerConfig | Namespace, name: str) -> bool:
    return bool(getattr(settings, name, None))
