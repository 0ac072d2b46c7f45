"""Find each token's previous tokens, given padding, packed sequences and a cache.

The shift must see the same sequence boundaries as attention. If a call's arguments leave them open,
the call is refused here.

Letters in shapes: b batch, g KV heads, w window, s new tokens, d head_dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from .compatibility_kvshift import Cache, max_length
from .configuration_kvshift import KVShiftLlamaConfig


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


def make_plan(
    config: KVShiftLlamaConfig,
    inputs: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
) -> ShiftPlan:
    """Make the plan of one forward pass.

    Args:
        config: The model's configuration.
        inputs: [b, s] or [b, s, hidden].
        attention_mask: [b, past + s], 0 for padding.
        position_ids: int64 [1 or b, s], as the caller gave them.
        cache: The tokens before the new ones.
        kwargs: Other arguments of the call, of which `cu_seq_lens_q` is read.

    Raises:
        ValueError: Attention and the shift would see different sequence boundaries.
    """
    batch, length = inputs.shape[:2]
    before = config.kv_shift_window - 1
    if attention_mask is not None:
        real = _mask_of_new_tokens(attention_mask, length, cache).to(inputs.device).bool()
        # Before the new tokens are real ones, or zeros at the start of a sequence.
        everything = torch.cat([real.new_ones(batch, before), real], 1)
        places, count = real_places(everything)
        rank = count[:, before:, None] - 2 - torch.arange(before, device=inputs.device)
        # Negative for masked tokens only.
        earlier = places.gather(1, rank.clamp(min=0).flatten(1)).view(batch, length, before)
        return ShiftPlan(earlier, last_tokens(everything, before), real)
    document = _documents(config, batch, length, position_ids, cache, kwargs)
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


def _documents(
    config: KVShiftLlamaConfig,
    batch: int,
    length: int,
    position_ids: Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Return the number of each token's packed sequence, [b, s]; None if nothing is packed."""
    starts = kwargs.get("cu_seq_lens_q")
    if position_ids is None:
        if starts is not None:
            raise ValueError(
                "cu_seq_lens_q comes without position_ids, which tell the shift where sequences "
                "start: pass both (DataCollatorWithFlattening does)"
            )
        return None
    compiling = torch.compiler.is_compiling()
    if length == 1 or (compiling and cache is not None):
        return None
    # As in attention's masks, a sequence starts where positions do not increase by one.
    documents = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    documents = documents.expand(batch, -1)
    if compiling:
        return documents
    if not documents[:, -1].any():
        return None
    flash = "flash" in str(config._attn_implementation)
    if cache is not None and not (flash and cache.get_seq_length() == 0):
        raise ValueError(
            "position_ids do not increase by one: packed sequences need use_cache=False (and no "
            "past_key_values), and padding needs an attention_mask"
        )
    if flash and batch > 1:
        raise ValueError(
            "position_ids hold packed sequences in a batch of several rows, but flash attention "
            "would take each row for one sequence: pack them into one row"
        )
    if flash or starts is not None:
        ours = (documents.diff(dim=-1)[0] > 0).nonzero().flatten() + 1
        if starts is None:
            starts = (position_ids[0] == position_ids.min()).nonzero().flatten()
        if not torch.equal(ours, starts[(starts > 0) & (starts < length)].to(ours)):
            raise ValueError(
                "position_ids do not increase by one, but attention would not take every jump for "
                "the start of a sequence: let the positions start at 0 in each sequence, in "
                "agreement with cu_seq_lens_q"
            )
    return documents


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
    return torch.argsort((~real).to(torch.int8), dim=-1, stable=True), real.cumsum(-1)


def last_tokens(real: Tensor, how_many: int) -> Tensor:
    """Return the places of the last real tokens in order, int64 [b, how_many].

    Each row must have that many.
    """
    places, count = real_places(real)
    return places.gather(1, count[:, -1:] - how_many + torch.arange(how_many, device=real.device))


__all__ = ["ShiftPlan", "last_tokens", "make_plan", "pick", "real_places"]
