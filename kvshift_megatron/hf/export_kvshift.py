"""Caches in programs that torch.export makes, as ExecuTorch and ONNX run them.

The library's recipes know the tensors of its own cache layers only: they register or return keys
and values, and nothing else lives from one step to the next. So in an exported program these layers
stay, and hold keys and values before shift and rotation; each step shifts and rotates all of them.
That costs one pass over the cache per step, and lets a program go back to any place.

Letters in shapes: b batch, s new tokens, t tokens of the cache with these, d head_dim.
"""

from typing import Any

import torch
from torch import Tensor

from .compatibility_kvshift import Cache, DynamicLayer, StaticLayer, is_exporting, max_length


def holds_raw_states(cache: Cache | None) -> bool:
    """Check whether a cache holds keys and values before shift and rotation in this pass."""
    layers = getattr(cache, "layers", None)
    if not is_exporting() or not isinstance(layers, list):
        return False
    replicated = getattr(cache, "layer_class_to_replicate", None)
    if not layers:
        return replicated is DynamicLayer
    return all(type(layer) in (DynamicLayer, StaticLayer) for layer in layers)


def whole_length(cache: Cache, length: int) -> int:
    """Return t: tokens of a dynamic cache with `length` new ones, or places of a static one."""
    room = max_length(cache)
    return room if room is not None and room > 0 else cache.get_seq_length() + length


def mask_of_all(attention_mask: Tensor | None, position_ids: Any, total: int) -> Tensor | None:
    """Check what a program with a cache is exported with, and return the mask bool [b, t], or None.

    Args:
        attention_mask: [b, up to t], 0 for padding.
        position_ids: Positions, as the caller gave them.
        total: t.

    Raises:
        ValueError: The positions of past tokens, which are rotated too, would be unknown.
    """
    if position_ids is not None:
        raise ValueError(
            "position_ids cannot be exported together with a cache: keys are rotated again in each "
            "step, by their places in the cache; leave position_ids out"
        )
    if attention_mask is None:
        return None
    return torch.nn.functional.pad(attention_mask.bool(), (0, total - attention_mask.shape[1]))


__all__ = ["holds_raw_states", "mask_of_all", "whole_length"]
