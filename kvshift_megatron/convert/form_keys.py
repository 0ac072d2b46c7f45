"""Rename what a checkpoint stores from one form of the model to the other (checks/model_forms.py).

What is stored under a key is a tensor, or an object such as a layer's extra state. Keys of the
optimizer have `optimizer.state.exp_avg.` or the like in front. Layers are stacked or numbered:

    decoder.layers.mlp.linear_fc1.weight                                tensor, all layers
    decoder.layers.mlp.linear_fc1._extra_state/shard_1_8                object, layer 1 of 8
    decoder.layers.mlp.experts...linear_fc1._extra_state/shard_1.3_8.4  object, expert 3 of 4 there
    decoder.layers.3.mlp.linear_fc1.weight                              tensor, one layer
    decoder.layers.3.mlp.linear_fc1._extra_state/shard_0_1              object, one layer
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from kvshift_megatron.checks.model_forms import (
    FINAL_NORM,
    NAMES,
    Form,
    Place,
    gpt_place,
    hybrid_layer,
    split_number,
)

# A hybrid model's output layer asks for a state that a GPT model's does not have.
HYBRID_ONLY = "output_layer._extra_state/shard_0_1"
_LAYERS = re.compile(r"^(.*?\bdecoder\.layers\.)(.*)$")
_SHARD = re.compile(r"^(.*)/shard_([\d.]+)_([\d.]+)$")
_WITHOUT_AXIS = (["0"], ["1"])  # numbers in the key of an object that is not in pieces
_PER_EXPERT = ".experts.experts."


class Stored(NamedTuple):
    """A stored thing, or one layer of it.

    Args:
        key: Its key.
        layer: Index along the first axis of a tensor of stacked layers; None for all of it.
    """

    key: str
    layer: int | None = None


class Thing(NamedTuple):
    """What a stored thing is, whatever the form.

    Args:
        before: Its key; of a layer's, what ends with "decoder.layers.".
        place: Of a layer's, its place in a GPT model; its part has the numbers of a numbered layer.
    """

    before: str
    place: Place | None = None


def things(key: str, num_stacked: int | None, form: Form) -> Iterator[tuple[Stored, Thing]]:
    """Yield what is stored under a key, layer by layer.

    Args:
        key: In a checkpoint of that form.
        num_stacked: Length of a tensor's first axis; None for an object.
        form: The checkpoint's.

    Raises:
        ValueError: It is in no layer of a GPT model.
    """
    match, numbered = _LAYERS.match(key), split_number(key)
    if match is None:
        ours, neutral = (FINAL_NORM[one] for one in (form, "gpt"))
        yield Stored(key), Thing(key.replace(ours, neutral))
    elif numbered is not None:
        before, layer, part = numbered
        place = Place(layer, part) if form == "gpt" else gpt_place(layer, part)
        yield Stored(key), Thing(before, _checked(place, key))
    elif num_stacked is None:
        layer, part = _without_layer_axis(match[2])
        yield Stored(key), Thing(match[1], _checked(Place(layer, part), key))
    else:
        for layer in range(num_stacked):
            yield Stored(key, layer), Thing(match[1], _checked(Place(layer, match[2]), key))


def _checked(place: Place | None, key: str) -> Place:
    if place is None or hybrid_layer(place) is None:
        raise ValueError(f"{key} has no place in {NAMES['gpt']} or in a hybrid one of its layers")
    return place


def named(thing: Thing, form: Form, stacked: int | None, is_object: bool) -> Stored:
    """Return where a thing is stored.

    Args:
        thing: From `things`.
        form: Of the checkpoint to write.
        stacked: Number of layers of a GPT model that stacks them; else None.
        is_object: Whether it is no tensor.
    """
    before, place = thing
    if place is None:
        return Stored(before.replace(FINAL_NORM["gpt"], FINAL_NORM[form]))
    if form == "hybrid":
        return Stored(f"{before}{hybrid_layer(place)}.{place.part}")
    if stacked is None:
        return Stored(f"{before}{place.layer}.{place.part}")
    if is_object:
        return Stored(before + _with_layer_axis(place, stacked))
    return Stored(before + place.part, place.layer)


def _without_layer_axis(part: str) -> tuple[int, str]:
    """Take the layer out of the numbers at the end of an object's key."""
    match = _SHARD.match(part)
    if match is None:
        raise ValueError(f"decoder.layers.{part} has no layer's number")
    (layer, *offsets), (_, *sizes) = (match[i].split(".") for i in (2, 3))
    return int(layer), _shard(match[1], *((offsets, sizes) if offsets else _WITHOUT_AXIS))


def _with_layer_axis(place: Place, num_layers: int) -> str:
    match = _SHARD.match(place.part)
    if match is None:
        raise ValueError(f"decoder.layers.{place.part} has no numbers at its end")
    offsets, sizes = (match[i].split(".") for i in (2, 3))
    if (offsets, sizes) == _WITHOUT_AXIS and _PER_EXPERT not in place.part:
        offsets, sizes = [], []
    return _shard(match[1], [str(place.layer), *offsets], [str(num_layers), *sizes])


def _shard(name: str, offsets: list[str], sizes: list[str]) -> str:
    return f"{name}/shard_{'.'.join(offsets)}_{'.'.join(sizes)}"
