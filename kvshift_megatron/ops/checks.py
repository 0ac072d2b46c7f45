"""Checks of the arguments of kv_shift and kv_shift_rope; error messages name the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

# [window, ng], or one tensor [ng] per token of the window; current token first.
Taps = Tensor | Sequence[Tensor]


def check_input(x_name: str, x: Tensor, taps_name: str, taps: Taps | None) -> None:
    """Raise ValueError unless x and its taps are as `kv_shift` documents them."""
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{x_name} must be [s, b, ng, hn] or [t, ng, hn], not of shape {list(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{x_name} must be of a floating dtype, not {x.dtype}")
    if taps is None:
        return
    if len(taps) < 2:
        raise ValueError(f"{taps_name} has {len(taps)} tap(s): a shift needs at least 2")
    groups = x.shape[-2]
    if any(tap.device != x.device for tap in ([taps] if isinstance(taps, Tensor) else taps)):
        raise ValueError(f"{taps_name} must be on {x.device}, the device of {x_name}")
    # Iterating over a tensor costs the host as much as the shift itself.
    if isinstance(taps, Tensor) and taps.shape[1:] == (groups,):
        return
    for j, tap in enumerate(taps, start=1):
        if tap.shape != torch.Size([groups]):
            raise ValueError(
                f"{taps_name}_{j} must be of shape [{groups}] (one scalar per query group of "
                f"{x_name}), not {list(tap.shape)}"
            )


def checked_index(name: str, index: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the index as int64; raise ValueError unless it has one entry per token of x."""
    if index is None or (index.shape == x.shape[:1] and index.device == x.device):
        return index if index is None else index.long()
    raise ValueError(
        f"{name} must be of shape [{x.size(0)}] (one entry per token) on {x.device}, not "
        f"{list(index.shape)} on {index.device}"
    )


def check_freqs(key: Tensor, freqs: Tensor, freq_index: Tensor | None) -> None:
    """Raise ValueError unless the angles are as `kv_shift_rope` documents them."""
    rotary = freqs.size(-1)
    if freqs.dtype != torch.float32 or freqs.requires_grad:
        raise ValueError(
            f"freqs must be fp32 and need no gradient, not {freqs.dtype} with requires_grad="
            f"{freqs.requires_grad}: rotate the keys after kv_shift instead"
        )
    if freqs.numel() != freqs.size(0) * rotary or rotary % 2 or rotary > key.size(-1):
        raise ValueError(
            f"freqs must be [positions, 1, 1, rotary] with an even rotary of at most "
            f"{key.size(-1)}, the head size of key, not {list(freqs.shape)}"
        )
    if freq_index is None and freqs.size(0) < key.size(0):
        raise ValueError(
            f"freqs has angles for {freqs.size(0)} positions and key has {key.size(0)} tokens: "
            "pass as many, or freq_index"
        )
