"""Layer specs with KV-shifting attention: entry points for Megatron's `--spec` and for code.

--spec kvshift_megatron.layer_specs kv_shift_layer_spec
"""

from dataclasses import replace as replace_fields
from typing import Any

try:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.attention import Attention, CrossAttention, SelfAttention
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from kvshift_megatron.arguments import megatron_args
    from kvshift_megatron.attention import KVShiftSelfAttention
    from kvshift_megatron.config import KVShiftConfig
    from kvshift_megatron.local import with_local_parts
    from kvshift_megatron.model_check import report_after_build
    from kvshift_megatron.spec_walk import module_class, rewrite
    from kvshift_megatron.validation import check_args, check_transformer_config
except ImportError as error:
    # Megatron turns an ImportError in a --spec module into "no spec": vanilla, silently.
    raise RuntimeError(f"kvshift_megatron.layer_specs cannot be imported: {error}") from error


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
    check_transformer_config(getattr(config, "transformer", config))
    args = megatron_args()
    if args is not None:
        check_args(args)
    spec = with_kv_shift(vanilla_layer_spec(config, vp_stage), kv_shift)
    report_after_build(config, kv_shift)
    return spec


def vanilla_layer_spec(
    config: Any, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The same layers without KV shifting: the twin to compare with.

    Differs from Megatron's default in the TE-free case only, where it allows sequence parallelism
    and does not materialize attention scores. Arguments as `kv_shift_layer_spec`.
    """
    transformer = getattr(config, "transformer", config)
    if transformer is config:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=config.transformer_impl == "transformer_engine",
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
        )
    else:
        from megatron.training.models.gpt import default_layer_spec

        spec = default_layer_spec(config, vp_stage)
    if transformer.transformer_impl == "local":
        spec = with_local_parts(spec, transformer, vp_stage)
    return spec


def with_kv_shift(spec: Any, kv_shift: KVShiftConfig = KVShiftConfig()) -> Any:
    """A deep copy of a Megatron spec in which every SelfAttention shifts its keys and values.

    Args:
        spec: any layer, block or multi-token-prediction spec: a ModuleSpec, a submodules
            dataclass, or a list or dict of such.
        kv_shift: the taps of every replaced layer.

    Returns:
        The copy; `spec` stays as it was.

    Raises:
        ValueError: nothing was replaced, or the spec holds an attention that is not exactly
            Megatron's SelfAttention and would have stayed as it is.
    """
    replaced, others = [], []

    def visit(node):
        module = module_class(node)
        if module is SelfAttention and isinstance(node, ModuleSpec):
            replaced.append(node)
            return replace_fields(
                node, module=KVShiftSelfAttention, params={**node.params, "kv_shift": kv_shift}
            )
        if module is KVShiftSelfAttention:
            raise ValueError(
                "the spec shifts keys and values already: convert the spec it came from"
            )
        if _is_other_attention(module):
            others.append(module.__name__)
        return node

    result = rewrite(spec, visit)
    if others:
        raise ValueError(
            f"the spec holds {', '.join(sorted(set(others)))}, which KV shifting does not replace "
            "(only Megatron's own SelfAttention): convert a spec without it"
        )
    if not replaced:
        raise ValueError(
            "the spec holds no SelfAttention, so that KV shifting would change nothing: pass a "
            "layer, block or MTP spec with Megatron's SelfAttention"
        )
    return result


def _is_other_attention(module: Any) -> bool:
    return (
        isinstance(module, type)
        and issubclass(module, Attention)
        and not issubclass(module, CrossAttention)
    )
