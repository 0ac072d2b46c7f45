"""Static specs, for releases whose `--spec` takes no callable (0.17 and 0.18), and hybrid models.

    --spec kvshift_megatron.static_specs te_layer_spec

te_layer_spec, te_qk_layernorm_layer_spec: dense GPT layers of Transformer Engine, without and with
    --qk-layernorm.
local_layer_spec, local_qk_layernorm_layer_spec: the same, TE-free (RMSNorm).
hybrid_stack_spec: Megatron's hybrid stack (Mamba, attention, MLP, MoE) with KV-shifting attention.

A static spec cannot see the configuration: the taps are KVShiftConfig's defaults, and mixture of
experts needs the callable in layer_specs.py. Without Transformer Engine only the local specs exist.
"""

from typing import Any

try:
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    from kvshift_megatron.specs.replace_attention import with_kv_shift
    from kvshift_megatron.specs.te_free.spec import with_local_modules
except ImportError as error:
    # Megatron takes an ImportError in a --spec module for "no spec", and trains vanilla attention.
    raise RuntimeError(f"kvshift_megatron.static_specs cannot be imported: {error}") from error


def _local(qk_layernorm: bool) -> Any:
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    return with_kv_shift(with_local_modules(spec))


local_layer_spec = _local(qk_layernorm=False)
local_qk_layernorm_layer_spec = _local(qk_layernorm=True)

if HAVE_TE:
    te_layer_spec = with_kv_shift(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=False))
    te_qk_layernorm_layer_spec = with_kv_shift(
        get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    )
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as _stack
    except ImportError:  # before 0.18
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as _stack
    hybrid_stack_spec = with_kv_shift(_stack)
