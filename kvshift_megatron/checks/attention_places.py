"""The attentions of a model, and the number that reports and metrics give each.

In a GPT model it is Megatron's layer number. A layer of a GPT model is two or more layers of a
hybrid model, where Megatron's numbers count MLP layers too; there an attention's number counts the
layers of its kind, that is of its symbol in the pattern. So attention 3 of `*-*-*-` is number 3, as
in the GPT model with the same layers. The first taps are drawn by this number.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.attention import Attention, CrossAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from kvshift_megatron.specs.hybrid_names import Symbols, parse_hybrid_pattern
from kvshift_megatron.specs.replace_attention import NO_ATTENTION


class AttentionPlace(NamedTuple):
    """One attention and where it is.

    Args:
        module: The attention: an Attention, or what stands in its place, such as linear attention.
        number: 1-based, the same on every pipeline stage. Layers of multi-token prediction are
            counted on their own, over all depths.
        is_mtp: Whether it belongs to multi-token prediction.
        symbol: Of its layer in a hybrid pattern; empty in a GPT model.
    """

    module: Any
    number: int
    is_mtp: bool
    symbol: str


def attention_places(chunk: torch.nn.Module) -> Iterator[AttentionPlace]:
    """Yield the attentions of a model chunk, wrapped or not, in the order of its modules."""
    modules = dict(chunk.named_modules())
    patterns = (getattr(module, "hybrid_layer_pattern", None) for module in modules.values())
    pattern = next(filter(None, patterns), None)
    for path, module in modules.items():
        attention = _attention(module)
        if attention is None:
            continue
        is_mtp = "mtp" in path.split(".")
        number, symbol = attention.layer_number, ""
        if pattern is not None:
            depth = _depth(path, modules) if is_mtp else 1
            number, symbol = _counted(pattern, number, depth, is_mtp)
        yield AttentionPlace(attention, number, is_mtp, symbol)


def _attention(module: torch.nn.Module) -> Any:
    """Return the attention that this module is, or holds without its being an Attention."""
    if isinstance(module, Attention) and not isinstance(module, CrossAttention):
        return module
    if isinstance(module, TransformerLayer):
        # Linear attention and the like is in this place.
        held = module.self_attention
        if not (isinstance(held, Attention) or type(held).__name__ in NO_ATTENTION):
            return held
    return None


def _depth(path: str, modules: dict[str, torch.nn.Module]) -> int:
    """Return the depth of multi-token prediction, 1-based, of which a module is a part."""
    parts = path.split(".")
    above = (modules[".".join(parts[:end])] for end in range(len(parts)))
    return next(
        module.layer_number for module in above if isinstance(module, MultiTokenPredictionLayer)
    )


def _counted(pattern: str, layer_number: int, depth: int, is_mtp: bool) -> tuple[int, str]:
    """Return the number among the layers of the same symbol, and this symbol.

    Args:
        pattern: `--hybrid-layer-pattern`.
        layer_number: Megatron's, 1-based; in multi-token prediction it begins anew in each depth.
        depth: Of multi-token prediction.
        is_mtp: Whether the layer belongs to it.
    """
    parsed = parse_hybrid_pattern(pattern)
    part = parsed.mtp_pattern if is_mtp else parsed.main_pattern
    layers = (part or "").replace(Symbols.PIPE, "")
    symbol = layers[layer_number - 1]
    before = (depth - 1) * layers.count(symbol)
    return before + layers[:layer_number].count(symbol), symbol
