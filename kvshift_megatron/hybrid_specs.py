"""Stack specs of Megatron's hybrid model with KV-shifting attention in every attention layer."""

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

try:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stock_stack_spec
except ImportError:  # before 0.18
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as stock_stack_spec

from kvshift_megatron.attention.spec_check import LayerSpec
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.gpt_specs import convert_specs
from kvshift_megatron.specs.hybrid_pattern import attention_numbers
from kvshift_megatron.specs.te_free.hybrid_stack import local_hybrid_stack
from kvshift_megatron.stored.settings import default_settings

__all__ = ["hybrid_stack", "kv_shift_hybrid_stack_spec"]


def kv_shift_hybrid_stack_spec(
    config: Any, *, kv_shift: KVShiftConfig | Mapping[str, Any] | None = None
) -> ModuleSpec:
    """Return the stack that Megatron would build by itself, with KV-shifting attention.

    For Megatron-Bridge: `provider.hybrid_stack_spec = kv_shift_hybrid_stack_spec`.

    Args:
        config: Megatron's HybridModelConfig, or a TransformerConfig with `hybrid_layer_pattern`,
            such as a Megatron-Bridge provider. Its `transformer_impl` chooses between Transformer
            Engine's layers and the TE-free ones.
        kv_shift: As for `layer_specs.kv_shift_layer_spec`.

    Raises:
        ValueError: KV shifting cannot honour a setting; the message names it.
    """
    kv_shift = default_settings() if kv_shift is None else kv_shift
    if not isinstance(kv_shift, KVShiftConfig):
        kv_shift = KVShiftConfig(**kv_shift)
    return hybrid_stack(config, kv_shift)


def hybrid_stack(config: Any, kv_shift: KVShiftConfig | None) -> ModuleSpec:
    """Do what `kv_shift_hybrid_stack_spec` does; without taps, for the baseline model."""
    transformer = getattr(config, "transformer", config)
    names = ("transformer_impl", "restore_modelopt_state")
    impl, quantized = (getattr(config, name, None) for name in names)
    if impl not in ("local", "transformer_engine") or quantized:
        raise ValueError(
            f"transformer_impl={impl!r}, restore_modelopt_state={quantized}: Megatron has another "
            "hybrid stack for inference and for ModelOpt, which is not converted: train with "
            "--transformer-impl transformer_engine or local"
        )
    stack = local_hybrid_stack(transformer) if impl == "local" else stock_stack_spec
    numbers = attention_numbers(config.hybrid_layer_pattern)
    static = LayerSpec(attention_numbers=numbers)
    return convert_specs(stack, None, config, kv_shift, static=static)[0]
