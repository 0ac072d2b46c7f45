"""Convert the specs of Megatron's own builders to KV-shifting attention.

For a patched Megatron-LM (`patches/`) and this package's own entry point: dense, mixture-of-experts
and heterogeneous layers, and multi-token prediction.
"""

from typing import Any

from kvshift_megatron.arguments import add_kv_shift_args
from kvshift_megatron.attention.spec_check import LayerSpec
from kvshift_megatron.attention.validation import check_at_start
from kvshift_megatron.checks.model import check_model, report_after_build
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.specs.replace_attention import with_kv_shift
from kvshift_megatron.specs.te_free import with_local_parts
from kvshift_megatron.stored.at_load import watch
from kvshift_megatron.stored.settings import asked_for as kv_shift_config_from_args

__all__ = ["add_kv_shift_args", "check_model", "convert_specs", "kv_shift_config_from_args"]


def convert_specs(
    layer_spec: Any,
    mtp_spec: Any,
    config: Any,
    kv_shift: KVShiftConfig | None,
    vp_stage: int | None = None,
    static: LayerSpec = LayerSpec(),
) -> tuple[Any, Any]:
    """Return both specs of a GPT model with KV-shifting attention for every SelfAttention.

    If `transformer_impl` is local, also put in this package's TE-free parts.

    Args:
        layer_spec: GPTModel's `transformer_layer_spec`, or None.
        mtp_spec: GPTModel's `mtp_block_spec`, or None.
        config: Megatron's GPTModelConfig (0.19) or a TransformerConfig.
        kv_shift: The taps; None for the baseline model.
        vp_stage: Virtual pipeline stage.
        static: What is known of the specs; see with_kv_shift.

    Raises:
        ValueError: KV shifting cannot honour a setting; the message names it.
    """
    transformer = getattr(config, "transformer", config)
    if kv_shift is not None:
        check_at_start(transformer)
    if transformer.transformer_impl == "local":
        layer_spec = with_local_parts(layer_spec, transformer, vp_stage)
        mtp_spec = with_local_parts(mtp_spec, transformer, vp_stage)
    if kv_shift is not None:
        watch(kv_shift)  # a pipeline stage may have no layer that could
        report_after_build(config, kv_shift)
        layer_spec = _shifting(layer_spec, kv_shift, static)
        mtp_spec = _shifting(mtp_spec, kv_shift, static)
    return layer_spec, mtp_spec


def _shifting(spec: Any, kv_shift: KVShiftConfig, static: LayerSpec) -> Any:
    # Uneven pipeline layouts have stages without a decoder layer.
    if spec is None or getattr(spec, "layer_specs", None) == []:
        return spec
    return with_kv_shift(spec, kv_shift, static)
