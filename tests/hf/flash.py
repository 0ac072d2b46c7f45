"""A stand-in for flash attention on a CPU, with the library's rules for what a sequence is.

It gets the arguments of the library's integration: a 2-D mask (or none), `cu_seq_lens_*` and
`position_ids`. test_documents.py compares it with that integration over the same kernels.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "flash_attention_stand_in"
# What the stand-in was called with: the mask's shape or None, and the names of other arguments.
SEEN: list[tuple[tuple | None, list[str]]] = []


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attend causally, [s, h, d] to the last tokens of [t, g, d]: [s, h, d]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * scaling
    hidden = torch.ones(scores.shape[1:]).triu(key.shape[0] - query.shape[0] + 1).bool()
    return torch.einsum("hst,thd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


def attend_packed(query, key, value, starts_q, starts_k, scaling) -> Tensor:
    """Attend within each sequence of flat tokens [n, h, d], as flash_attn_varlen_func."""
    output = torch.zeros_like(query)
    ends = zip(
        starts_q.tolist()[:-1], starts_q.tolist()[1:], starts_k.tolist(), starts_k.tolist()[1:]
    )
    for q0, q1, k0, k1 in ends:
        output[q0:q1] = attend(query[q0:q1], key[k0:k1], value[k0:k1], scaling)
    return output


def stand_in_for_flash(
    module, query, key, value, attention_mask, scaling=None, position_ids=None,
    cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **kwargs,
):  # fmt: skip
    """Attend to [b, h or g, s or t, d]; return [b, s, h, d] and None."""
    SEEN.append((None if attention_mask is None else attention_mask.shape, [*kwargs]))
    if position_ids is not None:
        SEEN[-1][1].append("position_ids")
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    length = query.shape[1]
    output = torch.zeros_like(query)
    if attention_mask is not None:
        assert attention_mask.shape == key.shape[:2]
        for row, real in enumerate(attention_mask.bool()):
            of_query = real[-length:]
            output[row, of_query] = attend(
                query[row, of_query], key[row, real], value[row, real], scaling
            )
        return output, None
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    if all(x is not None for x in (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)):
        return attend_packed(*flat, cu_seq_lens_q, cu_seq_lens_k, scaling).view_as(query), None
    if position_ids is not None and len(query) == 1 and length > 1:
        lowest, places = position_ids.min(), torch.arange(length)
        if (places + lowest != position_ids).any():
            starts = (position_ids.flatten() == lowest).nonzero().flatten()
            starts = torch.cat([starts, torch.tensor([length])])
            return attend_packed(*flat, starts, starts, scaling).view_as(query), None
    for row in range(len(query)):
        output[row] = attend(query[row], key[row], value[row], scaling)
    return output, None


@contextmanager
def registered(function=stand_in_for_flash):
    """Register the stand-in with flash attention's masks; yield its name."""
    attention, masks = AttentionInterface(), AttentionMaskInterface()
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    SEEN.clear()
    try:
        yield NAME
    finally:
        for interface in (attention, masks):
            interface._global_mapping.pop(NAME, None)
