"""Core attention with torch's scaled_dot_product_attention (SDPA)."""

import contextlib
import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from kvshift_megatron.attention.context_parallel import context_parallel_group
from kvshift_megatron.attention.packed_sequences import physical_cu_seqlens
from kvshift_megatron.specs.te_free.blockwise_attention import (
    Places,
    blockwise_attention,
    gather_keys,
    places_on_rank,
)
from kvshift_megatron.specs.te_free.sdpa import sdpa

_MASKED_BY_TENSOR = (AttnMaskType.padding, AttnMaskType.arbitrary)
_SUPPORTED_MASKS = (AttnMaskType.causal, AttnMaskType.no_mask, *_MASKED_BY_TENSOR)


class SDPACoreAttention(MegatronModule):
    """Compute softmax(Q K^T . scale + mask) V without materializing the score matrix.

    Replaces Megatron's DotProductAttention and takes its arguments. torch chooses the kernel:
    flash, memory-efficient, cuDNN or its CPU kernel; with dropout on a CPU its only kernel does
    materialize the scores.

    Raises:
        ValueError: This attention does not have a setting; the message names it.

    Parallelism: Each rank computes its own heads. Under context parallelism keys and values are
    gathered over the context-parallel group, and their gradients reduce-scattered. Dropout draws
    from Megatron's tensor-parallel RNG state, so that ranks drop independently.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        softmax_type = getattr(config, "softmax_type", "vanilla")
        if softmax_type != "vanilla":
            raise ValueError(
                f"softmax_type={softmax_type!r} is not in the core attention of a static spec: use "
                "--spec kvshift_megatron.layer_specs kv_shift_layer_spec or `python -m "
                "kvshift_megatron.pretrain`, which keep Megatron's own for it, or --softmax-type "
                "vanilla"
            )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group = context_parallel_group(config, pg_collection)
        self._check_mask_type(attn_mask_type)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # No apply_query_key_layer_scaling: it divides by the layer number before the softmax and
        # multiplies back inside, for fp16's range, and here the softmax is in fp32 anyway.
        self.softmax_scale = (
            1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        )
        self.window_size = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        ):
            self.window_size = config.window_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, np, hn], or [t, np, hn] for packed documents.
            key, value: [sk, b, ng, hn] or [t, ng, hn]; np is a multiple of ng.
            attention_mask: Bool, broadcastable to [b, np, sq, sk], True where NOT to attend; only
                for the mask types padding and arbitrary, as causal needs no tensor.
            attn_mask_type: Overrides the one given at construction.
            attention_bias: Must be None.
            packed_seq_params: Megatron's PackedSeqParams; documents packed as thd attend only
                within themselves.

        Returns:
            [sq, b, np * hn] or [t, np * hn], in the query's dtype.

        Raises:
            ValueError: There is a bias, or the mask type is not supported here.
        """
        if attention_bias is not None:
            raise ValueError(
                "attention_bias is not supported by the TE-free attention: drop it, or use "
                "--transformer-impl transformer_engine on a GPU"
            )
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        self._check_mask_type(mask_type)
        dropout = self.dropout if self.training else 0.0
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed or self.cp_group is not None:
            if mask_type != AttnMaskType.causal:
                raise ValueError(
                    f"attn_mask_type={mask_type.name}: with packed documents or context "
                    "parallelism the TE-free attention is always causal: use a causal mask type"
                )
            cu_seqlens = physical_cu_seqlens(packed_seq_params) if packed else None
            with self._rng(dropout):
                return self._blockwise(query, key, value, cu_seqlens, dropout)

        mask, is_causal = self._mask(mask_type, attention_mask, query, key)
        with self._rng(dropout):
            context = sdpa(
                query,
                key,
                value,
                scale=self.softmax_scale,
                dropout=dropout,
                mask=mask,
                is_causal=is_causal,
            )
        # [sq, b, np, hn] --> [sq, b, np * hn]
        return context.reshape(query.size(0), query.size(1), -1)

    def _blockwise(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, dropout: float
    ) -> Tensor:
        tokens, rank, ranks = query.size(0), 0, 1
        if query.dim() == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        if self.cp_group is not None:
            rank, ranks = self.cp_group.rank(), self.cp_group.size()
            key, value = (gather_keys(x, self.cp_group) for x in (key, value))
        places = [places_on_rank(cu_seqlens, tokens, r, ranks, query.device) for r in range(ranks)]
        key_places = Places(
            torch.cat([p.document for p in places]), torch.cat([p.position for p in places])
        )
        context = blockwise_attention(
            query,
            key,
            value,
            places[rank],
            key_places,
            scale=self.softmax_scale,
            dropout=dropout,
            window=None if self.window_size is None else self.window_size[0],
        )
        shape = (tokens, -1) if cu_seqlens is not None else (tokens, query.size(1), -1)
        return context.reshape(shape)

    def _mask(
        self, mask_type: AttnMaskType, attention_mask: Tensor | None, query: Tensor, key: Tensor
    ) -> tuple[Tensor | None, bool]:
        """Return (SDPA's mask, True where to attend, or None; SDPA's is_causal)."""
        sq, sk = query.size(0), key.size(0)
        mask: Tensor | None
        if mask_type in _MASKED_BY_TENSOR and attention_mask is not None:
            mask, is_causal = ~attention_mask, False
        else:
            # SDPA aligns is_causal with the first key, which is right for sq == sk only.
            mask, is_causal = None, mask_type == AttnMaskType.causal
            if is_causal and sq != sk:
                mask, is_causal = _band(sq, sk, (-1, 0), query.device), False
        if self.window_size is not None:
            band = _band(
                sq, sk, (self.window_size[0], 0 if is_causal else self.window_size[1]), query.device
            )
            mask, is_causal = band if mask is None else mask & band, False
        return mask, is_causal

    def _rng(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        # Under sequence parallelism TransformerBlock has already forked the state.
        if dropout == 0.0 or self.config.sequence_parallel:
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    @staticmethod
    def _check_mask_type(mask_type: AttnMaskType) -> None:
        if mask_type not in _SUPPORTED_MASKS:
            raise ValueError(
                f"attn_mask_type={mask_type} is not supported by the TE-free attention: use one of "
                f"{', '.join(m.name for m in _SUPPORTED_MASKS)}"
            )


def _band(sq: int, sk: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """Return bool [sq, sk], True where a query may see a key; the last query is at the last key.

    Args:
        sq, sk: Numbers of queries and keys.
        window: How many keys before and after its own a query sees; -1: all.
        device: Of the result.
    """
    left, right = window
    offset = torch.arange(sq, device=device)[:, None] + (sk - sq) - torch.arange(sk, device=device)
    allowed = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        allowed &= offset <= left
    if right >= 0:
        allowed &= offset >= -right
    return allowed
