"""What a patched Megatron-LM (`patches/`) and this package's own entry point build with.

Specs that Megatron's own builders made go in, the same specs with KV-shifting attention come out:
dense, mixture-of-experts and heterogeneous layers, and multi-token prediction.
"""

from typing import Any

from kvshift_megatron.arguments import add_kv_shift_args, kv_shift_config_from_args
from kvshift_megatron.attention.validation import check_at_start
from kvshift_megatron.checks.model import check_model, report_after_build
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.specs.replace_attention import with_kv_shift
from kvshift_megatron.specs.te_free import with_local_parts

__all__ = ["add_kv_shift_args", "check_model", "convert_specs", "kv_shift_config_from_args"]


def convert_specs(
    layer_spec: Any,
    mtp_spec: Any,
    config: Any,
    kv_shift: KVShiftConfig | None,
    vp_stage: int | None = None,
) -> tuple[Any, Any]:
    """Both specs of a GPT model, with every SelfAttention shifting.

    Where `transformer_impl` is local they also get this package's TE-free parts.

    Args:
        layer_spec: what GPTModel takes as `transformer_layer_spec`.
        mtp_spec: what it takes as `mtp_block_spec`. Either may be None: nothing to convert.
        config: Megatron's GPTModelConfig (0.19) or a TransformerConfig.
        kv_shift: the taps; None for the vanilla twin.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: a setting that KV shifting cannot honour; the message names it.
    """
    transformer = getattr(config, "transformer", config)
    specs = (layer_spec, mtp_spec)
    if kv_shift is not None:
        check_at_start(transformer)
    if transformer.transformer_impl == "local":
        specs = tuple(with_local_parts(spec, transformer, vp_stage) for spec in specs)
    if kv_shift is not None:
        report_after_build(config, kv_shift)
        specs = tuple(_shifting(spec, kv_shift) for spec in specs)
    return specs


def _shifting(spec, kv_shift):
    # Uneven pipeline layouts have stages without a decoder layer.
    if spec is None or getattr(spec, "layer_specs", None) == []:
        return spec
    return with_kv_shift(spec, kv_shift)
