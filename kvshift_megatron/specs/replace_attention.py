"""Replace the attention in a Megatron spec by KV-shifting attention, or refuse the spec."""

from dataclasses import replace as replace_fields
from functools import partial
from typing import Any

from megatron.core.transformer.attention import Attention, CrossAttention, SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.attention.spec_check import LayerSpec
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.specs.rewrite import module_class, rewrite

# What Megatron's heterogeneous models use in place of attention: nothing, or one matrix.
NO_ATTENTION = (
    "IdentityOp",
    "IdentityFuncOp",
    "ColumnParallelLinearGathered",
    "TELayerNormColumnParallelLinearGathered",
)
# What mixes tokens in a hybrid stack without keys and values that could be shifted.
_OTHER_MIXERS = ("GatedDeltaNet",)
# A hybrid stack (Mamba stack before 0.18) lists every kind of layer, and the layer pattern picks.
_STACKS = ("HybridStackSubmodules", "MambaStackSubmodules")


def with_kv_shift(
    spec: Any, kv_shift: KVShiftConfig = KVShiftConfig(), static: LayerSpec = LayerSpec()
) -> Any:
    """Return a deep copy of a Megatron spec with KV-shifting attention for every SelfAttention.

    Args:
        spec: Any layer, block, hybrid-stack or multi-token-prediction spec: a ModuleSpec, a
            submodules dataclass, or a list or dict of these.
        kv_shift: The taps of every replaced layer.
        static: The settings that the spec was made for, if it is made before there are any.

    Returns:
        The copy; `spec` itself does not change. A hybrid stack may list layer kinds whose attention
        cannot shift: these raise when the model is built, if the layer pattern asks for one.

    Raises:
        ValueError: Nothing was replaced, or the spec holds an attention that is not exactly
            Megatron's SelfAttention and would not shift.
    """
    conversion = _Conversion(kv_shift, static)
    result = rewrite(spec, conversion.visit)
    if conversion.refused:
        names = ", ".join(sorted(set(conversion.refused)))
        raise ValueError(
            f"the spec holds {names}, which KV shifting does not replace (only Megatron's own "
            "SelfAttention): convert a spec without it"
        )
    if not conversion.replaced:
        raise ValueError(
            "the spec holds no SelfAttention, so that KV shifting would change nothing: pass a "
            "layer, block, hybrid-stack or MTP spec with Megatron's SelfAttention"
        )
    return result


class _Conversion:
    """The visitor for one `rewrite`."""

    def __init__(self, kv_shift: KVShiftConfig, static: LayerSpec) -> None:
        self.params = {"kv_shift": kv_shift, "layer_spec": static}
        self.replaced = 0
        self.refused: list[str] = []

    def visit(self, node: Any) -> Any:
        module = module_class(node)
        if module is SelfAttention and isinstance(node, ModuleSpec):
            self.replaced += 1
            return replace_fields(
                node,
                module=KVShiftSelfAttention,
                params={**node.params, **self.params},
            )
        if module is KVShiftSelfAttention:
            raise ValueError(
                "the spec already shifts keys and values: convert the spec that it was made from"
            )
        if _is_other_attention(module):
            self.refused.append(module.__name__)
        elif isinstance(node, TransformerLayerSubmodules):
            return self._layer(node)
        elif type(node).__name__ in _STACKS:
            self._allow_guarded(node)
        return node

    def _allow_guarded(self, stack: Any) -> None:
        """Drop the refusals of a stack's layers: guards raise if one is built, others may be."""

        def visit(node: Any) -> Any:
            module = module_class(node)
            if module is RefusedAttention:
                self.refused.remove(node.params["class_name"])
            elif isinstance(node, ModuleSpec) and module.__name__ in _OTHER_MIXERS:
                self.refused.remove(module.__name__)
            return node

        rewrite(stack, visit)

    def _layer(self, node: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
        """Guard a layer whose self_attention is not a SelfAttention."""
        module = module_class(node.self_attention)
        if module is KVShiftSelfAttention:
            return replace_fields(
                node, self_attention=_with_experts(node.self_attention, _has_experts(node.mlp))
            )
        if module is None or module.__name__ in NO_ATTENTION:
            return node
        if not _is_other_attention(module):
            self.refused.append(module.__name__)
        if module.__name__ in _OTHER_MIXERS:
            return node
        # Even if a hybrid stack may list this layer, it must never be built as if it shifted.
        guard = ModuleSpec(RefusedAttention, params={"class_name": module.__name__})
        return replace_fields(node, self_attention=guard)


class RefusedAttention:
    """The attention of a hybrid stack's layer that cannot shift: building it raises.

    Raises:
        ValueError: Always.
    """

    def __init__(self, *args: Any, class_name: str, **kwargs: Any) -> None:
        raise ValueError(
            f"the layer pattern asks for a layer with {class_name}, which has no per-head keys "
            "and values to shift: use attention (*), Mamba (M), gated delta net (G), MLP (-) and "
            "MoE (E) layers only, or train without KV shifting"
        )


def _has_experts(mlp: Any) -> bool | None:
    """Return whether a layer's MLP is a mixture of experts; None if it has no MLP."""
    module = module_class(mlp)
    if isinstance(module, type) and issubclass(module, MoELayer):
        return True
    return False if isinstance(mlp, ModuleSpec | partial) and module is not IdentityOp else None


def _with_experts(attention: ModuleSpec, has_experts: bool | None) -> ModuleSpec:
    layer_spec = replace_fields(attention.params["layer_spec"], has_experts=has_experts)
    return replace_fields(attention, params={**attention.params, "layer_spec": layer_spec})


def _is_other_attention(module: Any) -> bool:
    return (
        isinstance(module, type)
        and issubclass(module, Attention)
        and not issubclass(module, CrossAttention)
    )
