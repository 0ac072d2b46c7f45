"""Megatron's hybrid stack without Transformer Engine: attention, MLP, expert and delta-net layers.

Megatron's own hybrid stack spec consists of Transformer Engine's modules; there is no local one.
"""

from dataclasses import fields
from typing import Any, NoReturn

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from kvshift_megatron.specs.hybrid_names import HybridStack, HybridStackSubmodules, Symbols


def local_hybrid_stack(config: TransformerConfig) -> ModuleSpec:
    """Return a hybrid stack spec for `transformer_impl` local.

    Its layers are the halves of Megatron's TE-free GPT layer, so that the pattern `*-` is that
    layer. Layers that need Transformer Engine or a GPU's kernels raise when they are built.

    Args:
        config: Of the model; it decides on norms of queries and keys, and on experts.
    """
    layer = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    ).submodules
    experts = get_moe_module_spec(
        use_te=False,
        num_experts=config.num_moe_experts or 1,  # read only if a layer with experts is built
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    layers = {
        "attention_layer": ModuleSpec(
            TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=layer.input_layernorm,
                self_attention=layer.self_attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
            ),
        ),
        "gdn_layer": ModuleSpec(
            TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=layer.input_layernorm,
                self_attention=ModuleSpec(
                    GatedDeltaNet,
                    submodules=GatedDeltaNetSubmodules(
                        in_proj=ColumnParallelLinear,
                        out_norm=layer.input_layernorm,
                        out_proj=RowParallelLinear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        "mlp_layer": _feed_forward(MLPLayer, layer, layer.mlp),
        "moe_layer": _feed_forward(MoETransformerLayer, layer, experts),
        "mtp_block_spec": ModuleSpec(
            MultiTokenPredictionBlock,
            submodules=MultiTokenPredictionBlockSubmodules(
                # The pattern says which layers it holds.
                layer_specs=[get_mtp_layer_spec(None, use_transformer_engine=False)]
            ),
        ),
    }
    # Which kinds there are depends on the release.
    kinds = {field.name for field in fields(HybridStackSubmodules)}
    stack = {kind: layers.get(kind) or _needs_te(kind) for kind in kinds}
    return ModuleSpec(HybridStack, submodules=HybridStackSubmodules(**stack))


def _feed_forward(module: type, layer: TransformerLayerSubmodules, mlp: Any) -> ModuleSpec:
    submodules = TransformerLayerSubmodules(
        pre_mlp_layernorm=layer.pre_mlp_layernorm,
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
        # Checkpoints have the keys of the GPT layer.
        sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
    )
    return ModuleSpec(module, submodules=submodules)


def _needs_te(name: str) -> ModuleSpec:
    kind = name.removesuffix("_layer")
    symbol = getattr(Symbols, {"dsa": "DS_ATTENTION"}.get(kind, kind.upper()))
    return ModuleSpec(_NeedsTransformerEngine, params={"kind": f"{kind} ({symbol})"})


class _NeedsTransformerEngine(TransformerLayer):
    """A layer that cannot be built here.

    Raises:
        ValueError: Always.
    """

    def __init__(self, *args: Any, kind: str, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"hybrid_layer_pattern asks for a layer of the kind {kind}, which Megatron has only "
            "with Transformer Engine: use attention (*), MLP (-), experts (E) and gated delta net "
            "(G) in --hybrid-layer-pattern, or --transformer-impl transformer_engine on a GPU"
        )
