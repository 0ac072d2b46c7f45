"""Layer specs with KV-shifting attention: entry points for Megatron's `--spec` and for code.

--spec kvshift_megatron.layer_specs kv_shift_layer_spec
"""

from typing import Any

try:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from kvshift_megatron.config import KVShiftConfig
    from kvshift_megatron.conversion import with_kv_shift
    from kvshift_megatron.stock import convert_specs
except ImportError as error:
    # Megatron turns an ImportError in a --spec module into "no spec": vanilla, silently.
    raise RuntimeError(f"kvshift_megatron.layer_specs cannot be imported: {error}") from error

__all__ = ["kv_shift_layer_spec", "vanilla_layer_spec", "with_kv_shift"]


def kv_shift_layer_spec(
    config: Any, vp_stage: int | None = None, *, kv_shift: KVShiftConfig = KVShiftConfig()
) -> ModuleSpec | TransformerBlockSubmodules:
    """The GPT layers that Megatron would build by itself, with KV-shifting attention.

    Args:
        config: Megatron's GPTModelConfig (what `--spec` passes) or a TransformerConfig. Its
            `transformer_impl` chooses Transformer Engine's layer or the TE-free one.
        vp_stage: virtual pipeline stage.
        kv_shift: the taps.

    Returns:
        What GPTModel takes as `transformer_layer_spec`.

    Raises:
        ValueError: a setting that KV shifting cannot honour; the message names it.
    """
    return convert_specs(_stock_layer_spec(config, vp_stage), None, config, kv_shift, vp_stage)[0]


def vanilla_layer_spec(
    config: Any, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The same layers without KV shifting: the twin to compare with.

    Differs from Megatron's default in the TE-free case only, where it allows sequence parallelism
    and does not materialize attention scores. Arguments as `kv_shift_layer_spec`.
    """
    return convert_specs(_stock_layer_spec(config, vp_stage), None, config, None, vp_stage)[0]


def _stock_layer_spec(config, vp_stage):
    """What Megatron builds where nobody gives it a spec."""
    if not hasattr(config, "transformer"):
        return get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=config.transformer_impl == "transformer_engine",
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
        )
    from megatron.training.models.gpt import default_layer_spec

    return default_layer_spec(config, vp_stage)
