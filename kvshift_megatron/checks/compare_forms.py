"""A GPT model's checkpoint for a hybrid model, and the reverse: what Megatron makes of it.

From 0.19 on Megatron reads the first by itself, and stops at the second. Anything else would end
with an error from deep inside the load.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from kvshift_megatron.checks.model_forms import (
    FINAL_NORM,
    NAMES,
    Form,
    Place,
    form_of,
    gpt_layers,
    hybrid_layer,
    pattern_in,
    pattern_of,
    split_number,
)
from kvshift_megatron.checks.stored_files import StoredModel
from kvshift_megatron.specs.hybrid_names import HybridStack

Shapes = dict[str, tuple[int, ...]]

# Translates keys while Megatron loads.
_TRANSLATION = "megatron.core.dist_checkpointing.gpt_checkpoint_interop"
_LAYERS = "decoder.layers."
# Formats of the distributed optimizer's state in which each parameter has its own tensors.
_BY_PARAMETER = ("fully_reshardable", "fully_sharded_model_space")


class Fitted(NamedTuple):
    """A checkpoint's tensors as the model names them.

    Args:
        shapes: Global shape by key.
        fresh: Beginnings of the model's keys that the checkpoint cannot hold and need not.
        is_translated: Whether Megatron loads a GPT model's checkpoint into a hybrid model.
    """

    shapes: Shapes
    fresh: tuple[str, ...] = ()
    is_translated: bool = False


def compare_forms(
    directory: Path, stored: StoredModel, model: list[torch.nn.Module], args: Namespace
) -> Fitted:
    """Return a checkpoint's tensors as the model will ask for them.

    Args:
        directory: The checkpoint's folder, for messages.
        stored: What it holds.
        model: This rank's chunks, wrapped or not.
        args: Megatron's.

    Raises:
        ValueError: The checkpoint is of the other form, and Megatron cannot load it into the model;
            the message names both forms and what to do.
    """
    theirs, ours = form_of(stored.shapes), model_form(model)
    if stored.content is None or theirs is None or theirs == ours:
        return Fitted(stored.shapes)
    if theirs == "hybrid":
        raise ValueError(_hybrid_for_gpt(directory, stored.shapes))
    convert = _converter(directory, "hybrid")
    if importlib.util.find_spec(_TRANSLATION) is None:
        raise ValueError(
            f"load: the checkpoint {directory} is of {NAMES['gpt']}, and this run builds "
            f"{NAMES['hybrid']}: this release of Megatron-Core cannot load one into the other: "
            f"{convert}"
        )
    fitted = _as_hybrid(directory, stored.shapes, args)
    sharding = stored.content.get("distrib_optim_sharding_type")
    if sharding not in (None, *_BY_PARAMETER) and not getattr(args, "no_load_optim", False):
        raise ValueError(
            f"load: the checkpoint {directory} is of {NAMES['gpt']}, and its optimizer state has "
            f"the format {sharding}, which a hybrid model cannot load: save it once more with "
            "--dist-ckpt-optim-fully-reshardable, or add --no-load-optim to start with its weights "
            "and a new optimizer state"
        )
    return fitted


def model_form(model: list[torch.nn.Module]) -> Form:
    """Return the form of a built model."""
    modules = (module for chunk in model for module in chunk.modules())
    return "hybrid" if any(isinstance(module, HybridStack) for module in modules) else "gpt"


def _converter(directory: Path, form: Form) -> str:
    return f"convert it with kvshift-convert change-form {directory} TARGET --model-form {form}"


def _hybrid_for_gpt(directory: Path, shapes: Shapes) -> str:
    has_mtp = any(key.startswith("mtp.") for key in shapes)  # more layers than the pattern shows
    pattern = None if has_mtp else pattern_in(shapes)
    shown = pattern or "of its --hybrid-layer-pattern"
    remedy = (
        f"train it with --hybrid-layer-pattern '{pattern}'" if pattern else "train it with that"
    )
    try:
        gpt_layers(pattern or "")
    except ValueError:
        pass
    else:
        remedy += f", or {_converter(directory, 'gpt')}"
    return (
        f"load: the checkpoint {directory} is of {NAMES['hybrid']} with the layers {shown}, and "
        f"this run builds {NAMES['gpt']}, whose tensors have other names: {remedy}"
    )


def _as_hybrid(directory: Path, shapes: Shapes, args: Namespace) -> Fitted:
    """Name a GPT checkpoint's tensors as Megatron will look for them in a hybrid model."""
    from megatron.core.dist_checkpointing.gpt_checkpoint_interop import gpt_compatible_layer_maps

    pattern = getattr(args, "hybrid_layer_pattern", None) or ""
    whose = f"load: the checkpoint {directory} is of {NAMES['gpt']}"
    try:
        maps = gpt_compatible_layer_maps(pattern)
    except ValueError as error:
        raise ValueError(
            f"{whose}, and Megatron cannot load it into this run's hybrid model ({error}): set "
            f"--hybrid-layer-pattern {_pattern(shapes)}, or load a hybrid model's checkpoint"
        ) from error
    if any(split_number(key) for key in shapes):
        raise ValueError(
            f"{whose} whose layers are not stacked in one tensor (they differ, as with "
            "--moe-layer-freq), and Megatron cannot load that into a hybrid model: train it with "
            "the flags that it was saved with"
        )
    layers = {shape[0] for key, shape in shapes.items() if key.startswith(_LAYERS)}
    if layers != {maps.num_gpt_layers}:
        raise ValueError(
            f"{whose} with {', '.join(map(str, sorted(layers)))} layers, and this run's {pattern} "
            f"is a hybrid model of {maps.num_gpt_layers}: set --hybrid-layer-pattern "
            f"{_pattern(shapes)}, or load another checkpoint"
        )
    attention = {layer: number for number, layer in maps.attention_to_gpt.items()}
    mlp = {layer: number for number, layer in maps.mlp_to_gpt.items()}
    named = dict(_named_as_hybrid(shapes, (attention, mlp)))
    fresh = tuple(f"{_LAYERS}{number}." for number in sorted(maps.fresh_init))
    return Fitted(named, fresh, True)


def _named_as_hybrid(
    shapes: Shapes, numbers: tuple[Mapping[int, int], Mapping[int, int]]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield hybrid keys and shapes.

    Args:
        shapes: Of a GPT checkpoint with stacked layers.
        numbers: GPT layer -> hybrid layer of its attention, and of its MLP.
    """
    for key, shape in shapes.items():
        part = key.removeprefix(_LAYERS)
        if part == key:
            yield key.replace(FINAL_NORM["gpt"], FINAL_NORM["hybrid"]), shape
            continue
        kind = hybrid_layer(Place(0, part))
        if kind is None:
            continue
        for layer in range(shape[0]):
            yield f"{_LAYERS}{numbers[kind][layer]}.{part}", shape[1:]


def _pattern(shapes: Shapes) -> str:
    """Return the pattern of the hybrid model that a GPT checkpoint is, quoted for a shell."""
    layers = max((shape[0] for key, shape in shapes.items() if key.startswith(_LAYERS)), default=0)
    return f"'{pattern_of(layers, f'{_LAYERS}mlp.router.weight' in shapes)}'"
