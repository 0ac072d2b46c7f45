"""The two forms of one model in the keys of a checkpoint: Megatron's GPT model and its hybrid one.

    GPT      decoder.layers.self_attention...     layers stacked along a first axis, or numbered
             decoder.final_layernorm...
    hybrid   decoder.layers.6.self_attention...   attention of GPT layer 3
             decoder.layers.7.mlp...              its MLP, or its experts
             decoder.final_norm...

The pattern of a hybrid model that is a GPT model is `*-` per layer, with experts `*E`.

Imports neither Megatron nor torch.
"""

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

Form = Literal["gpt", "hybrid"]
FORMS: tuple[Form, ...] = get_args(Form)
NAMES: dict[Form, str] = {"gpt": "a GPT model", "hybrid": "a hybrid model"}
FINAL_NORM: dict[Form, str] = {"gpt": "decoder.final_layernorm.", "hybrid": "decoder.final_norm."}
# The parts of a GPT layer by the layer of a hybrid model that has them.
_PARTS = {
    0: ("self_attention.", "input_layernorm.", "self_attn_bda."),
    1: ("mlp.", "pre_mlp_layernorm.", "mlp_bda."),
}
_NUMBERED = re.compile(r"^(.*?\bdecoder\.layers\.)(\d+)\.(.*)$")
# What tells kinds of layers apart, the first that a layer has.
_KINDS = {"self_attention.linear_qkv.": "*", "mlp.router.": "E", "mlp.": "-", "mixer.": "M"}


class Place(NamedTuple):
    """Where a tensor of a layer is in a GPT model.

    Args:
        layer: 0-based.
        part: Its name in the layer, such as "mlp.linear_fc1.weight".
    """

    layer: int
    part: str


def form_of(keys: Iterable[str]) -> Form | None:
    """Return the form of a checkpoint's model; None if its keys do not tell."""
    found = {form for key in keys for form, norm in FINAL_NORM.items() if key.startswith(norm)}
    return found.pop() if len(found) == 1 else None


def hybrid_layer(place: Place) -> int | None:
    """Return the hybrid layer, 0-based, that holds a part of a GPT layer; None for no part."""
    offset = _offset(place.part)
    return None if offset is None else 2 * place.layer + offset


def gpt_place(layer: int, part: str) -> Place | None:
    """Return the place of a part of hybrid layer `layer` (0-based) in a GPT model.

    None if a layer with this number cannot have it: the pattern is not that of a GPT model.
    """
    return Place(layer // 2, part) if _offset(part) == layer % 2 else None


def _offset(part: str) -> int | None:
    return next((offset for offset, parts in _PARTS.items() if part.startswith(parts)), None)


def split_number(key: str) -> tuple[str, int, str] | None:
    """Split a key into what ends with "decoder.layers.", the layer's number, and the rest."""
    match = _NUMBERED.match(key)
    return (match[1], int(match[2]), match[3]) if match else None


def hybrid_key(key: str) -> str:
    """Return the key in a hybrid checkpoint of a weight of a GPT model with numbered layers.

    Keys of other weights stay as they are.
    """
    numbered = split_number(key)
    if numbered is None:
        return key.replace(FINAL_NORM["gpt"], FINAL_NORM["hybrid"])
    before, layer, part = numbered
    number = hybrid_layer(Place(layer, part))
    return key if number is None else f"{before}{number}.{part}"


def pattern_of(num_layers: int, has_experts: bool) -> str:
    """Return the pattern of the hybrid model that is a GPT model of `num_layers` layers."""
    return ("*E" if has_experts else "*-") * num_layers


def gpt_layers(pattern: str) -> tuple[int, bool]:
    """Return number of layers of the GPT model that a pattern is, and whether they have experts.

    Args:
        pattern: `--hybrid-layer-pattern`.

    Raises:
        ValueError: It is not the pattern of a GPT model; the message says why.
    """
    main, _, mtp = pattern.partition("/")
    layers = main.replace("|", "")
    if mtp:
        raise ValueError("it has layers for multi-token prediction (/)")
    others = sorted(set(layers) - set("*-E"))
    if others:
        raise ValueError(f"a GPT model has no layer of the kind {others[0]}")
    for has_experts in (False, True):
        if layers and layers == pattern_of(len(layers) // 2, has_experts):
            return len(layers) // 2, has_experts
    raise ValueError("a GPT model is *- per layer, or *E per layer if it has experts")


def pattern_in(keys: Iterable[str]) -> str | None:
    """Return the layers of a hybrid model's checkpoint as a pattern; None if one is unknown.

    Args:
        keys: Of its weights.
    """
    parts: dict[int, list[str]] = {}
    for key in keys:
        if (numbered := split_number(key)) and numbered[0] == "decoder.layers.":
            parts.setdefault(numbered[1], []).append(numbered[2])
    if not parts or sorted(parts) != list(range(len(parts))):
        return None
    kinds = [_kind(parts[layer]) for layer in range(len(parts))]
    return "".join(kind for kind in kinds if kind) if all(kinds) else None


def _kind(parts: list[str]) -> str | None:
    kinds = (kind for name, kind in _KINDS.items() if any(p.startswith(name) for p in parts))
    return next(kinds, None)
