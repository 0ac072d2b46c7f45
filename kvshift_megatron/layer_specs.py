"""Layer specs with KV-shifting attention, for Megatron's `--spec` and for code.

--spec kvshift_megatron.layer_specs kv_shift_layer_spec
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

try:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
        get_gpt_heterogeneous_layer_spec,
    )
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.heterogeneous.heterogeneous_config import (
        HeterogeneousTransformerConfig,
    )
    from megatron.core.transformer.multi_token_prediction import get_mtp_num_layers_to_build
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from kvshift_megatron.config import KVShiftConfig
    from kvshift_megatron.gpt_specs import convert_specs
    from kvshift_megatron.specs.replace_attention import with_kv_shift
    from kvshift_megatron.stored.settings import default_settings
except ImportError as error:
    # Megatron takes an ImportError in a --spec module for "no spec", and trains vanilla attention.
    raise RuntimeError(f"kvshift_megatron.layer_specs cannot be imported: {error}") from error

__all__ = ["kv_shift_layer_spec", "shifting", "vanilla_layer_spec", "with_kv_shift"]


# Settings of a Megatron-Bridge provider that change its own layer spec.
_OWN_SPEC_SETTINGS = (
    "use_transformer_engine_op_fuser",
    "use_transformer_engine_full_layer_spec",
    "dense_grouped_gemm",
)


def kv_shift_layer_spec(
    config: Any,
    vp_stage: int | None = None,
    *,
    kv_shift: KVShiftConfig | Mapping[str, Any] | None = None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the GPT layers that Megatron would build by itself, with KV-shifting attention.

    Args:
        config: Megatron's GPTModelConfig (what `--spec` passes) or a TransformerConfig, such as a
            Megatron-Bridge provider. Its `transformer_impl` chooses between Transformer Engine's
            layer and the TE-free one.
        vp_stage: Virtual pipeline stage.
        kv_shift: The taps, or KVShiftConfig's fields by name (these can be written to YAML). None:
            KVShiftConfig's defaults, or with Megatron's `--use-checkpoint-args` what the checkpoint
            was trained with; then the call is collective over all ranks.

    Returns:
        A `transformer_layer_spec` for GPTModel.

    Raises:
        ValueError: KV shifting cannot honour a setting; the message names it.
    """
    _refuse_own_spec(config)
    kv_shift = default_settings() if kv_shift is None else kv_shift
    return _converted(_stock_layer_spec(config, vp_stage), config, vp_stage, kv_shift)


def shifting(
    spec: ModuleSpec | TransformerBlockSubmodules | Callable,
    kv_shift: KVShiftConfig | Mapping[str, Any] = KVShiftConfig(),
) -> Callable:
    """Return a spec callable for the layers of `spec` with KV-shifting attention.

    For models with a layer spec of their own, such as Megatron-Bridge's providers:
    `provider.transformer_layer_spec = shifting(provider.transformer_layer_spec)`.

    Args:
        spec: A static spec, or a callable that takes the configuration and, if it has such a
            parameter, `vp_stage`.
        kv_shift: The taps, or KVShiftConfig's fields by name.

    Returns:
        A callable with the arguments and exceptions of `kv_shift_layer_spec`.
    """

    def shifting_layer_spec(
        config: Any, vp_stage: int | None = None
    ) -> ModuleSpec | TransformerBlockSubmodules:
        made = spec
        if not isinstance(spec, ModuleSpec) and callable(spec):
            takes_stage = "vp_stage" in inspect.signature(spec).parameters
            made = spec(config, vp_stage=vp_stage) if takes_stage else spec(config)
        return _converted(made, config, vp_stage, kv_shift)

    return shifting_layer_spec


def vanilla_layer_spec(
    config: Any, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the layers of the baseline model: the same without KV shifting.

    They differ from Megatron's own only without Transformer Engine: they allow sequence parallelism
    and do not materialize attention scores. The arguments are those of `kv_shift_layer_spec`.
    """
    return convert_specs(_stock_layer_spec(config, vp_stage), None, config, None, vp_stage)[0]


def _converted(
    spec: Any, config: Any, vp_stage: int | None, kv_shift: KVShiftConfig | Mapping[str, Any]
) -> Any:
    if not isinstance(kv_shift, KVShiftConfig):
        kv_shift = KVShiftConfig(**kv_shift)
    transformer = getattr(config, "transformer", config)
    if isinstance(spec, ModuleSpec) and transformer.heterogeneous_block_specs:
        raise ValueError(
            "heterogeneous_block_specs: every layer has a configuration of its own, but the spec "
            "is one layer for all: use kv_shift_layer_spec"
        )
    spec = convert_specs(spec, None, config, kv_shift, vp_stage)[0]
    # Builders that take a spec callable use Megatron's own layer for MTP if it returns no layer.
    is_empty = getattr(spec, "layer_specs", None) == []
    if is_empty and config.mtp_num_layers and get_mtp_num_layers_to_build(config, vp_stage):
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers}: the pipeline stage with multi-token "
            "prediction has no decoder layer, so its MTP layers would silently be vanilla: keep a "
            "decoder layer on that stage (pipeline_model_parallel_layout)"
        )
    return spec


def _refuse_own_spec(config: Any) -> None:
    """Raise ValueError if this model would not be built from Megatron's stock spec."""
    own = getattr(type(config), "transformer_layer_spec", None)
    names = [name for name in _OWN_SPEC_SETTINGS if getattr(config, name, False)]
    if callable(own) and own.__name__ != "default_layer_spec":
        names.append(f"{type(config).__name__}.transformer_layer_spec={own.__name__}")
    if names:
        raise ValueError(
            f"{', '.join(names)}: this model has a layer spec of its own, which "
            "kv_shift_layer_spec would replace: set provider.transformer_layer_spec = "
            "kvshift_megatron.layer_specs.shifting(provider.transformer_layer_spec)"
        )
    is_bare_te = not hasattr(config, "transformer") and config.transformer_impl != "local"
    if is_bare_te and config.attention_backend == AttnBackend.local:
        raise ValueError(
            "attention_backend=local is not applied to a block spec: set another attention_backend,"
            " or transformer_impl='local'"
        )


def _stock_layer_spec(config: Any, vp_stage: int | None) -> Any:
    """Return the spec that Megatron uses if none is given."""
    if hasattr(config, "transformer"):
        from megatron.training.models.gpt import default_layer_spec

        return default_layer_spec(config, vp_stage)
    use_te = config.transformer_impl == "transformer_engine"
    if isinstance(config, HeterogeneousTransformerConfig):
        return get_gpt_heterogeneous_layer_spec(config, use_te, vp_stage=vp_stage)
    return get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
