"""Find each token's previous tokens, given padding, packed sequences and a cache.

Letters in shapes: b batch, g KV heads, w window, s new tokens, d head_dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from .compatibility_kvshift import POSITIONS_ARE_PASSED, Cache, max_length
from .configuration_kvshift import KVShiftLlamaConfig
from .documents_kvshift import check_padded, documents, is_fresh, positions_from_lengths


class ShiftPlan(NamedTuple):
    """The previous tokens of each token, for one forward pass; the same for all layers.

    Indices count in [the last w - 1 tokens of the cache | the new tokens]. None stands for the
    plain case: no token is masked, and each row is one sequence.

    Args:
        earlier: int64 [b, s, w - 1], indices of the 1st, 2nd, ... token before each new token.
        last: int64 [b, w - 1], indices of the last tokens of the sequence, in order.
        real: bool [b, s], which new tokens are not padding.
    """

    earlier: Tensor | None = None
    last: Tensor | None = None
    real: Tensor | None = None


def place_tokens(
    inputs: Tensor,
    position_ids: Tensor | None,
    cache_position: Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
) -> tuple[bool, Tensor, Tensor | None]:
    """Find the positions of the new tokens.

    Args:
        inputs: [b, s] or [b, s, hidden].
        position_ids: int [1 or b, s], or None.
        cache_position: int64 [s], their places in the cache, or None.
        cache: The tokens before them.
        kwargs: Other arguments of the call, of which `cu_seq_lens_q` is read.

    Returns:
        Whether the caller gave positions, in any of these ways; position_ids; and cache_position,
        or None for releases whose caches count tokens themselves.

    Raises:
        ValueError: position_ids have another shape.
    """
    batch, length = inputs.shape[:2]
    if position_ids is None:
        position_ids = positions_from_lengths(kwargs, batch, length)
    elif tuple(position_ids.shape) not in ((1, length), (batch, length)):
        raise ValueError(
            f"position_ids has the shape {list(position_ids.shape)} for {batch} rows of {length} "
            f"tokens: pass [{batch}, {length}] or [1, {length}]"
        )
    given = position_ids is not None or cache_position is not None
    if position_ids is None or (POSITIONS_ARE_PASSED and cache_position is None):
        past = 0 if cache is None else cache.get_seq_length()
        places = torch.arange(length, device=inputs.device)
        cache_position = places + past if cache_position is None else cache_position
        position_ids = cache_position[None] if position_ids is None else position_ids
    return given, position_ids, cache_position


def make_plan(
    config: KVShiftLlamaConfig,
    inputs: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
    starts_anywhere: bool = False,
) -> ShiftPlan:
    """Make the plan of one forward pass.

    Args:
        config: The model's configuration.
        inputs: [b, s] or [b, s, hidden].
        attention_mask: [b, past + s], 0 for padding; None if attention does not see the caller's.
        position_ids: int64 [1 or b, s]; None if they only count the tokens of the cache and these.
        cache: The tokens before the new ones.
        kwargs: Other arguments of the call, for attention.
        starts_anywhere: Sequences may start at positions above 0.

    Raises:
        ValueError: Attention and the shift would see different sequence boundaries.
    """
    batch, length = inputs.shape[:2]
    before = config.kv_shift_window - 1
    if attention_mask is not None:
        new = _mask_of_new_tokens(attention_mask, length, cache).to(inputs.device)
        if is_fresh(cache):
            check_padded(new, position_ids, kwargs, starts_anywhere)
        real = new.bool()
        # Before the new tokens are real ones, or zeros at the start of a sequence.
        everything = torch.cat([real.new_ones(batch, before), real], 1)
        places, count = real_places(everything)
        rank = count[:, before:, None] - 2 - torch.arange(before, device=inputs.device)
        # Negative for masked tokens only.
        earlier = places.gather(1, rank.clamp(min=0).flatten(1)).view(batch, length, before)
        return ShiftPlan(earlier, last_tokens(everything, before), real)
    if position_ids is None:
        return ShiftPlan()
    document = documents(config, (batch, length), position_ids, cache, kwargs, starts_anywhere)
    if document is None:
        return ShiftPlan()
    # One more place: the previous tokens of a next token are those that a cache keeps.
    place = torch.arange(before, before + length + 1, device=inputs.device)
    back = torch.arange(1, before + 1, device=inputs.device)
    earlier = (place[:, None] - back).expand(batch, -1, -1)
    padded = nn.functional.pad(document, (before, 0), value=-1)
    same = padded.gather(1, earlier.flatten(1)).view_as(earlier) == torch.cat(
        [document, document[:, -1:]], 1
    ).unsqueeze(-1)
    # Place 0 holds zeros, as the cache, if there is one, is empty.
    earlier = earlier.where(same, 0)
    return ShiftPlan(earlier[:, :-1], earlier[:, -1].flip(-1))


def _mask_of_new_tokens(attention_mask: Tensor, length: int, cache: Cache | None) -> Tensor:
    """Return the columns [b, s] of the new tokens in a mask [b, past + s]."""
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, Tensor):
        # A static cache: the mask may be as long as the cache, whose length is on the device.
        columns = torch.arange(length, device=attention_mask.device) + past.to(
            attention_mask.device
        )
        return attention_mask.index_select(1, columns)
    width = attention_mask.shape[1]
    if width != past + length and not (cache is not None and width == max_length(cache)):
        raise ValueError(
            f"attention_mask has {width} columns for {past} past and {length} new tokens: it needs "
            "one column for each token"
        )
    return attention_mask[:, past : past + length]


def pick(states: Tensor, index: Tensor) -> Tensor:
    """Take states [b, g, t, d] at index int64 [b, i]: [b, g, i, d]."""
    b, g, _, d = states.shape
    return states.gather(2, index[:, None, :, None].expand(b, g, index.shape[1], d))


def real_places(real: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the real tokens are.

    Args:
        real: bool [b, t].

    Returns:
        places int64 [b, t], those of the real tokens in order, then those of the others.
        count int64 [b, t], the number of real tokens up to and including each place.
    """
    # Each place's rank in that order. (A stable sort would do, but ONNX has none.)
    count, others = real.long().cumsum(-1), (~real).long().cumsum(-1)
    rank = torch.where(real, count, count[:, -1:] + others) - 1
    order = torch.arange(real.shape[1], device=real.device).expand_as(rank)
    return torch.zeros_like(rank).scatter(1, rank, order), count


def last_tokens(real: Tensor, how_many: int) -> Tensor:
    """Return the places of the last real tokens in order, int64 [b, how_many].

    Each row must have that many.
    """
    places, count = real_places(real)
    return places.gather(1, count[:, -1:] - how_many + torch.arange(how_many, device=real.device))


__all__ = ["ShiftPlan", "last_tokens", "make_plan", "pick", "place_tokens", "real_places"]
