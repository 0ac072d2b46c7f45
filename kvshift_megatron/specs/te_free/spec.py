"""Put the TE-free parts into Megatron's own local specs."""

from dataclasses import replace as replace_fields
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from kvshift_megatron.specs.rewrite import module_class, rewrite
from kvshift_megatron.specs.te_free.core_attention import SDPACoreAttention
from kvshift_megatron.specs.te_free.norm import SequenceParallelNorm

try:
    import apex  # noqa: F401  (probe: the class below can be imported even without apex)
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
except ImportError:
    FusedLayerNorm = None


def with_local_parts(spec: Any, config: TransformerConfig, vp_stage: int | None = None) -> Any:
    """Return a copy of a TE-free spec that also runs under sequence parallelism.

    Args:
        spec: A layer, block, hybrid-stack or MTP spec for `transformer_impl` local, or None.
        config: Of the model; it gives the number of layers on this pipeline stage.
        vp_stage: Virtual pipeline stage.

    Returns:
        The copy, or None for None. A layer spec becomes a block spec: only that names the norm
        after the last layer, for which Megatron would choose Transformer Engine's wherever it can
        be imported, even without a GPU. Megatron's own core attention stays for a softmax_type
        that only it has.

    Raises:
        ValueError: The core attention of a softmax_type has no context parallelism.
    """
    if isinstance(spec, ModuleSpec) and issubclass(module_class(spec), TransformerLayer):
        num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
        spec = TransformerBlockSubmodules(
            layer_specs=[spec] * num_layers, layer_norm=_final_norm(config)
        )
    keeps_core = getattr(config, "softmax_type", "vanilla") != "vanilla"
    if keeps_core and config.context_parallel_size > 1:
        raise ValueError(
            f"softmax_type={config.softmax_type!r} with context_parallel_size="
            f"{config.context_parallel_size}: Megatron's TE-free core attention, which alone has "
            "this softmax, has no context parallelism: set --context-parallel-size 1 or "
            "--softmax-type vanilla, or use --transformer-impl transformer_engine on a GPU"
        )
    spec = rewrite(spec, _replace_norm if keeps_core else _replace)
    # Megatron's builders pass qk_l2_norm to their other specs, but not to the TE-free layer.
    return rewrite(spec, _add_l2_norm) if config.qk_l2_norm else spec


def with_local_modules(spec: Any) -> Any:
    """Return a copy of a TE-free spec with only its norm and core attention replaced."""
    return rewrite(spec, _replace)


def _replace(node: Any) -> Any:
    return SDPACoreAttention if node is DotProductAttention else _replace_norm(node)


def _add_l2_norm(node: Any) -> Any:
    if isinstance(node, SelfAttentionSubmodules):
        return replace_fields(node, q_layernorm=L2Norm, k_layernorm=L2Norm)
    return node


def _replace_norm(node: Any) -> Any:
    if node is WrappedTorchNorm or (node is FusedLayerNorm and _apex_cannot_run()):
        return SequenceParallelNorm
    return node


def _final_norm(config: TransformerConfig) -> type:
    # As in Megatron's local spec: Apex has a fused LayerNorm but no RMSNorm.
    if FusedLayerNorm is not None and config.normalization == "LayerNorm":
        return FusedLayerNorm
    return WrappedTorchNorm


def _apex_cannot_run() -> bool:
    return FusedLayerNorm is not None and not torch.cuda.is_available()
