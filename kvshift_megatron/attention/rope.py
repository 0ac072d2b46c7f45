"""Decide whether a layer rotates its keys in the same pass over memory that shifts them.

It does if Megatron's own rotation is a fused kernel, on a GPU, and sequences are not split over
context-parallel ranks. Megatron still rotates the queries.
"""

import functools
import logging
import os
from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kvshift_megatron.attention.packed_sequences import document_positions
from kvshift_megatron.ops import kv_shift_rope
from kvshift_megatron.ops.dispatch import Shift, choose

logger = logging.getLogger(__name__)

VARIABLE = "KVSHIFT_ROPE"
CHOICES = ("auto", "fused", "separate")


class RopeFusion:
    """Decide for one layer: once by its configuration, then by the tensors of each call.

    Args:
        config, layer_number: Those of the attention.
        is_spread: Whether sequences are split over context-parallel ranks.
        window: Taps per key; 1 if keys are not shifted.

    Attributes:
        is_possible: Whether the configuration allows keys to be rotated in the pass.

    Raises:
        ValueError: KVSHIFT_ROPE is not one of CHOICES, or the configuration rules its value out.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, is_spread: bool, window: int = 2
    ) -> None:
        self.window = window
        wanted = os.environ.get(VARIABLE, "auto")
        if wanted not in CHOICES:
            raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, not {wanted!r}")
        self._is_forced = wanted == "fused"
        obstacle = _obstacle(config, is_spread)
        self._refuse_if_forced(obstacle)
        if wanted == "separate":
            obstacle = f"{VARIABLE}=separate"
        if config.no_rope_freq and config.no_rope_freq[layer_number - 1]:
            obstacle = "no_rope_freq"
        self.is_possible = obstacle is None

    def take(
        self, rotary_pos_emb: Tensor | tuple[Any, Any] | None, hidden_states: Tensor
    ) -> tuple[Tensor | None, Tensor | tuple[Any, Any] | None]:
        """Return (angles for the fused pass or None, angles left for Megatron to rotate by).

        Args:
            rotary_pos_emb: Angles [s, 1, 1, rotary], or a pair: those of queries and of keys.
            hidden_states: [s, b, h], on the device and in the dtype of the keys.

        Raises:
            ValueError: KVSHIFT_ROPE=fused, and these tensors cannot take the fused pass.
        """
        if rotary_pos_emb is None or not self.is_possible:
            return None, rotary_pos_emb
        if isinstance(rotary_pos_emb, tuple):
            queries, keys = rotary_pos_emb
        else:
            queries = keys = rotary_pos_emb
        if keys is None:
            return None, rotary_pos_emb
        obstacle = self.why_not_fused(hidden_states.device, hidden_states.dtype)
        if obstacle is None and (keys.dtype != torch.float32 or keys.numel() != keys[:, 0].numel()):
            obstacle = "the angles differ from sample to sample, or are not fp32"
        if obstacle is None:
            _log("in the pass that shifts keys")
            return keys, (queries, None)
        self._refuse_if_forced(obstacle)
        _log(f"by Megatron ({obstacle})")
        return None, rotary_pos_emb

    def check_at_start(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ValueError if KVSHIFT_ROPE=fused, and such keys cannot take the fused pass."""
        if self._is_forced and self.is_possible:
            self._refuse_if_forced(self.why_not_fused(device, dtype))

    def why_not_fused(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return a clause that says why no kernel rotates such keys; None if one does."""
        choice = choose(Shift(device, dtype, self.window, "rope_shift"))
        if choice.name == "triton":
            return None
        if choose(Shift(device, dtype, self.window)).name == "triton":
            return choice.obstacle
        return "the shift does not run in Triton here"

    def _refuse_if_forced(self, obstacle: str | None) -> None:
        if self._is_forced and obstacle:
            raise ValueError(f"{VARIABLE}=fused: {obstacle}: set it to auto or separate")


def shift_and_rotate(
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    freqs: Tensor,
    cu_seqlens: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Apply `shift_across_boundaries` to an unsplit sequence and rotate the keys.

    Args:
        key, value, alpha, beta, cu_seqlens: As for `shift_across_boundaries`.
        freqs: fp32 [positions, 1, 1, rotary]; each packed document starts at the first row.
        interleaved: Megatron's rotary_interleaved.
    """
    position = places = None
    if cu_seqlens is not None:
        document, position = document_positions(cu_seqlens, key.size(0))
        # Padding after the last document may be longer than any: rotate it by the first row.
        places = position.where(document < len(cu_seqlens) - 1, 0)
    return kv_shift_rope(
        key, value, alpha, beta, freqs, position, freq_index=places, interleaved=interleaved
    )


def _obstacle(config: TransformerConfig, is_spread: bool) -> str | None:
    if not config.apply_rope_fusion:
        return "apply_rope_fusion is off"
    if is_spread:
        return "context parallelism finishes the shift too late for a fused rotation"
    if config.flash_decode:
        return "flash_decode rotates keys in its own kernel"
    # Here Megatron falls back to the unfused rotation: rotate keys as it rotates queries.
    if getattr(config, "mrope_section", None) is not None:
        return "mrope_section"
    if _yarn_get_concentration_factor_from_config(config) != 1.0:
        return "YaRN's concentration factor"
    return None


@functools.cache
def _log(how: str) -> None:
    if not torch.compiler.is_compiling():
        logger.info("kvshift_megatron: rotary embedding of the shifted keys: %s", how)
