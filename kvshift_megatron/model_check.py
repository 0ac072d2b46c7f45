"""Which attention did every layer of a built model get? Say it, or stop the run."""

from typing import Any

import torch
from megatron.core.transformer.attention import Attention, CrossAttention
from megatron.core.utils import get_attr_wrapped_model

from kvshift_megatron.attention import KVShiftSelfAttention
from kvshift_megatron.config import KVShiftConfig


def report_after_build(model_config: Any, kv_shift: KVShiftConfig | None) -> None:
    """Have the built model checked and reported, once, before training starts.

    Args:
        model_config: Megatron's model configuration; one without hooks (a bare TransformerConfig)
            is left alone.
        kv_shift: what was asked for; None for the vanilla twin.
    """
    hooks = getattr(model_config, "post_wrap_hooks", None)
    # A spec callable runs once per virtual pipeline stage: one hook is enough.
    if hooks is None or any(isinstance(hook, _Report) for hook in hooks):
        return
    hooks.append(_Report(kv_shift))


class _Report:
    """A post-wrap hook of Megatron's model builder."""

    def __init__(self, kv_shift: KVShiftConfig | None):
        self.kv_shift = kv_shift

    def __call__(self, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
        layers = gather_layers(model)
        line = describe(layers)
        if torch.distributed.get_rank() == 0:
            print(f"kvshift_megatron: {line}", flush=True)
        shifting = [layer for layer in layers if layer[2] is not None]
        if self.kv_shift is not None and not shifting:
            raise ValueError(
                f"KV shifting was asked for, but the model holds none ({line}): "
                "check the layer spec (--spec), or train the vanilla twin with --no-kv-shift"
            )
        if self.kv_shift is None and shifting:
            raise ValueError(f"the vanilla twin was asked for, but the model shifts ({line})")
        return model


def local_layers(model: list[torch.nn.Module]) -> list[tuple]:
    """(layer_number, attention class name, KVShiftConfig or None, taps) of this rank's layers.

    Taps are counted over the whole layer, whatever part of it this rank holds.
    """
    layers = []
    for module in (module for chunk in model for module in chunk.modules()):
        if not isinstance(module, Attention) or isinstance(module, CrossAttention):
            continue
        kv_shift = module.kv_shift if isinstance(module, KVShiftSelfAttention) else None
        taps = kv_shift.parameters_per_group * module.config.num_query_groups if kv_shift else 0
        layers.append((module.layer_number, type(module).__name__, kv_shift, taps))
    return layers


def gather_layers(model: list[torch.nn.Module]) -> list[tuple]:
    """`local_layers` of every pipeline stage, by layer number. Collective over the pp group."""
    layers = local_layers(model)
    group = get_attr_wrapped_model(model[0], "pg_collection").pp
    if group.size() > 1:
        parts = [None] * group.size()
        torch.distributed.all_gather_object(parts, layers, group=group)
        layers = [layer for part in parts for layer in part]
    return sorted(layers, key=lambda layer: layer[0])


def describe(layers: list[tuple]) -> str:
    """One line: which layers have which attention, and how many taps there are in all."""
    kinds = {}
    for number, class_name, kv_shift, _ in layers:
        kind = f"KV shifting ({kv_shift.describe()})" if kv_shift else f"vanilla ({class_name})"
        kinds.setdefault(kind, []).append(number)
    parts = [f"{kind} in {_ranges(numbers)}" for kind, numbers in kinds.items()]
    taps = sum(layer[3] for layer in layers)
    return f"attention: {'; '.join(parts) or 'none'}; {taps} taps"


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> 'layers 1-3, 7'."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"
