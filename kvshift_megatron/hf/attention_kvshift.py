"""Attention with shifted keys and values.

Letters in shapes: b batch, h attention heads, g KV heads, w window, s new tokens, t all tokens,
d head_dim.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .callers_kvshift import SHARDED
from .compatibility_kvshift import Cache, attention_function, init, update
from .configuration_kvshift import KVShiftLlamaConfig
from .layers_kvshift import KVShiftRMSNorm, rotate
from .plan_kvshift import ShiftPlan, pick

# The least derivative of a gate by its logit: further out a sigmoid's own would stop it for good.
FLATTEST_GATE = 1e-4


class KVShiftLlamaAttention(nn.Module):
    """Grouped-query attention over shifted keys and values (arXiv 2411.19574, Eq. 4-6, App. F).

    K^_i = sum_j alpha_j K_{i-j+1}, V^_i = sum_j beta_j V_{i-j+1}, with zeros before the first token
    of a sequence. The shift comes after the projection (and normalization) and before the rotary
    embedding. It computes in fp32 (float64 for float64). Each tap is a separate parameter [g]; for
    their names see KVShiftLlamaConfig.tap_names.
    """

    def __init__(self, config: KVShiftLlamaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        # Attention implementations read these three attributes.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        hidden, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias or config.qkv_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias or config.qkv_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias or config.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=bias)
        if config.qk_norm:
            self.q_norm = KVShiftRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = KVShiftRMSNorm(self.head_dim, config.rms_norm_eps)
        self.tap_names = config.tap_names()
        for names in self.tap_names.values():
            for name in names:
                tap = nn.Parameter(torch.empty(config.num_key_value_heads))
                self.register_parameter(name, tap)

    @torch.no_grad()
    def draw_taps(self) -> None:
        """Draw the paper's initial taps: all but the last ~ U(0, 1), the last is 1 minus their sum.

        ``clamp`` with a window above 2 starts as identity instead: most last taps would start below
        0, so that the applied taps would not sum to 1.
        """
        for names in self.tap_names.values():
            parameters = [getattr(self, name) for name in names]
            first = torch.rand(self.config.kv_shift_window - 1, *parameters[0].shape)
            if self.config.kv_shift_variant == "clamp" and len(first) > 1:
                first = torch.eye(*first.shape)[:, :1].expand_as(first)
            values = [*first, 1.0 - first.sum(0)]
            if self.config.kv_shift_variant == "gate":
                values = [torch.logit(first[0], eps=1e-6)]
            for parameter, value in zip(parameters, values):
                init.copy_(parameter, value.to(parameter))

    def taps(self, kind: str, dtype: torch.dtype) -> Tensor:
        """Return the taps to apply to "key" or "value": [w, g] in `dtype`, current token first."""
        parameters = torch.stack([getattr(self, name) for name in self.tap_names[kind]]).to(dtype)
        if self.config.kv_shift_variant == "gate":
            gate = torch.sigmoid(parameters[0])
            is_flat = (gate * (1.0 - gate)).detach() < FLATTEST_GATE
            gate = torch.where(is_flat, _with_slope(gate, parameters[0], FLATTEST_GATE), gate)
            return torch.stack((gate, 1.0 - gate))
        if self.config.kv_shift_variant == "clamp":
            return _with_slope(parameters.clamp(0.0, 1.0), parameters, 1.0)
        return parameters

    def shift(self, kind: str, extended: Tensor, plan: ShiftPlan) -> Tensor:
        """Shift keys or values [b, g, w - 1 + s, d], previous tokens included, to [b, g, s, d]."""
        wide = extended.double() if extended.element_size() > 4 else extended.float()
        taps = self.taps(kind, wide.dtype)[:, :, None, None]
        before = len(taps) - 1
        length = extended.shape[2] - before
        shifted = taps[0] * wide[:, :, before:]
        for j in range(1, len(taps)):
            if plan.earlier is None:
                earlier = wide[:, :, before - j : before - j + length]
            else:
                earlier = pick(wide, plan.earlier[:, :, j - 1])
            shifted = shifted + taps[j] * earlier
        return shifted.to(extended.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        plan: ShiftPlan,
        cache: Cache | None = None,
        cache_position: Tensor | None = None,
        key_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the new tokens and those of the cache.

        Args:
            hidden_states: [b, s, hidden].
            position_embeddings: Cosines and sines, [1 or b, s, d] each.
            attention_mask: In the form that the configured attention implementation takes.
            plan: From KVShiftLlamaModel.forward.
            cache: With the layers of cache_kvshift.py.
            cache_position: int64 [s]; see compatibility_kvshift.update.
            key_embeddings: Cosines and sines of all tokens, [1, t, d] each, for a cache that holds
                keys and values before shift and rotation (export_kvshift.py); None for others.
            **kwargs: For the attention implementation.

        Returns:
            Output [b, s, hidden], and weights [b, h, s, t] or None, as the implementation does.

        Raises:
            ValueError: accelerate's context parallelism splits the sequence.
        """
        if "is_causal" in kwargs:
            # Put there by a hook of accelerate, which also takes the mask away. The model does not.
            raise ValueError(SHARDED.format("cp_size above 1 (accelerate's context parallelism)"))
        shape = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*shape, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))

        before = self.config.kv_shift_window - 1
        states = {"key": key, "value": value}
        if cache is not None and key_embeddings is not None:
            everything = update(cache, key, value, self.layer_idx, cache_position)
            states = dict(zip(states, everything))
        new = {kind: states[kind] for kind in self.tap_names}
        if cache is not None and key_embeddings is None:
            extended = cache.layers[self.layer_idx].extend(new, plan)
        else:
            extended = {k: nn.functional.pad(x, (0, 0, before, 0)) for k, x in new.items()}
        states |= {kind: self.shift(kind, x, plan) for kind, x in extended.items()}

        query = rotate(query, *position_embeddings)
        key = rotate(states["key"], *(key_embeddings or position_embeddings))
        value = states["value"]
        if cache is not None and key_embeddings is None:
            key, value = update(cache, key, value, self.layer_idx, cache_position)
        attend = attention_function(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


def _with_slope(taps: Tensor, parameters: Tensor, slope: float) -> Tensor:
    """Return `taps` to the bit, with the constant `slope` as their derivative by `parameters`.

    A tap must learn wherever its parameter is: also outside a clamp, or far out in a sigmoid.
    """
    return taps.detach() + slope * (parameters - parameters.detach())


def eager_attention(
    module: KVShiftLlamaAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(q k^T * scaling + mask) v, with the softmax in fp32.

    Args:
        module: The attention.
        query: [b, h, s, d].
        key, value: [b, g, t, d] each.
        attention_mask: [1 or b, 1, s, at least t], added to the scores.
        scaling: Factor of the scores.
        dropout: Probability, in training.
        **kwargs: Arguments of other implementations, ignored.

    Returns:
        Output [b, s, h, d], and weights [b, h, s, t].
    """
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


__all__ = ["KVShiftLlamaAttention", "eager_attention"]
