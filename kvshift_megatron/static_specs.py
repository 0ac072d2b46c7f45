"""Static specs, for releases whose `--spec` takes no callable (0.17 and 0.18), and hybrid models.

    --spec kvshift_megatron.static_specs te_layer_spec

te_layer_spec, te_qk_layernorm_layer_spec: dense GPT layers of Transformer Engine, without and with
    --qk-layernorm.
local_layer_spec, local_qk_layernorm_layer_spec: the same, TE-free (RMSNorm).
hybrid_stack_spec: Megatron's hybrid stack (Mamba, attention, MLP, MoE) with KV-shifting attention.

A static spec cannot see the configuration: the taps are KVShiftConfig's defaults. A setting that
asks for another layer, such as experts, is refused when the model is built; it needs the callable
in layer_specs.py. So is a spec of Transformer Engine without Transformer Engine.
"""

from typing import Any, NoReturn

try:
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from kvshift_megatron.attention.spec_check import LayerSpec
    from kvshift_megatron.specs.hybrid_pattern import attention_numbers_of_the_run
    from kvshift_megatron.specs.replace_attention import with_kv_shift
    from kvshift_megatron.specs.te_free.spec import with_local_modules
except ImportError as error:
    # Megatron takes an ImportError in a --spec module for "no spec", and trains vanilla attention.
    raise RuntimeError(f"kvshift_megatron.static_specs cannot be imported: {error}") from error


# What get_gpt_layer_*_spec turn into another layer, and what a layer without Transformer Engine
# leaves out, with the only values that a static spec honours. A release may lack a setting.
_OFF = (False, None)
_SELF_ATTENTION = {
    "qk_l2_norm": _OFF,
    "multi_latent_attention": _OFF,
    "experimental_attention_variant": (None,),
    "heterogeneous_block_specs": _OFF,
    "use_kitchen": _OFF,
    "use_kitchen_attention": _OFF,
}
_DENSE = {
    "num_moe_experts": (None,),
    "use_te_activation_func": _OFF,
    "use_transformer_engine_op_fuser": _OFF,
    "use_grouped_gemm_for_dense_mlp": _OFF,
}
# A TE-free spec may be named beside --transformer-impl transformer_engine, which is the default.
_LOCAL = {"transformer_impl": ("local", "transformer_engine"), "fp8": _OFF, "fp4": _OFF}
_TE = {"transformer_impl": ("transformer_engine",)}

# What runs without Transformer Engine.
_LOCAL_LAYER = (
    "kvshift_megatron.static_specs local_layer_spec or local_qk_layernorm_layer_spec "
    "(with --transformer-impl local)"
)
_LOCAL_HYBRID = (
    "python -m kvshift_megatron.pretrain --hybrid-layer-pattern with --transformer-impl local "
    "(megatron-core 0.19)"
)


def _local(name: str, qk_layernorm: bool) -> Any:
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    made_for = {"qk_layernorm": (qk_layernorm,), **_SELF_ATTENTION, **_DENSE, **_LOCAL}
    return with_kv_shift(with_local_modules(spec), static=LayerSpec(name=name, only=made_for))


def _te(name: str, qk_layernorm: bool) -> Any:
    if not HAVE_TE:
        return _needs_te(name, _LOCAL_LAYER)
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    made_for = {"qk_layernorm": (qk_layernorm,), **_SELF_ATTENTION, **_DENSE, **_TE}
    return with_kv_shift(spec, static=LayerSpec(name=name, only=made_for))


def _hybrid(name: str) -> Any:
    if not HAVE_TE:
        return _needs_te(name, _LOCAL_HYBRID)
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stack
    except ImportError:  # before 0.18
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as stack
    made_for = {"qk_layernorm": (False,), **_SELF_ATTENTION, **_TE}
    static = LayerSpec(name=name, only=made_for, attention_numbers=attention_numbers_of_the_run)
    return with_kv_shift(stack, static=static)


def _needs_te(name: str, instead: str) -> ModuleSpec:
    return ModuleSpec(_NeedsTransformerEngine, params={"spec_name": name, "instead": instead})


class _NeedsTransformerEngine(TransformerLayer):
    """The layer of a spec that cannot be made here: building it raises.

    Raises:
        ValueError: Always.
    """

    def __init__(self, *args: Any, spec_name: str, instead: str, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{spec_name} needs Transformer Engine, which is not installed or cannot be imported: "
            f"use {instead}, or install it"
        )


local_layer_spec = _local("local_layer_spec", qk_layernorm=False)
local_qk_layernorm_layer_spec = _local("local_qk_layernorm_layer_spec", qk_layernorm=True)
te_layer_spec = _te("te_layer_spec", qk_layernorm=False)
te_qk_layernorm_layer_spec = _te("te_qk_layernorm_layer_spec", qk_layernorm=True)
hybrid_stack_spec = _hybrid("hybrid_stack_spec")
