"""The layers around the attention: norm, rotary embedding, MLP and mixture of experts.

Their parameters have Llama's (and Mixtral's) names. They are plain PyTorch without buffers: only
parameters need values when a model is loaded.

Letters in shapes: b batch, s tokens, t tokens of all sequences, h hidden size, d head_dim,
e experts, k experts per token, i intermediate size.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from .compatibility_kvshift import ACT2FN
from .configuration_kvshift import KVShiftLlamaConfig


class KVShiftRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class KVShiftRotaryEmbedding(nn.Module):
    """Angles of the rotary embedding, with Llama 3's scaling if the configuration asks for it.

    Each call computes the frequencies: a buffer of them would be cast with the model, or left empty
    by a loader that fills only what a file holds.
    """

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.rope = dict(config.rope_parameters)

    def frequencies(self, device: torch.device) -> Tensor:
        """Return fp32 [d / 2], in radians per token."""
        # In fp32, as in training: at position 10^5, a difference in the last bit is 0.01 radians.
        channel = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        frequency = 1.0 / self.rope["rope_theta"] ** (channel / self.head_dim)
        return self._llama3(frequency) if self.rope["rope_type"] == "llama3" else frequency

    def _llama3(self, frequency: Tensor) -> Tensor:
        """Divide slow frequencies by `factor`, keep fast ones, interpolate those between."""
        rope = self.rope
        turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequency)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1.0 - kept) * frequency / rope["factor"] + kept * frequency

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Map positions int [b, s] to cosines and sines [b, s, d], in the dtype of `x`."""
        angles = position_ids[..., None].float() * self.frequencies(x.device)
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [b, heads, s, d] by angles [b, s, d]; channel i is paired with channel i + d / 2."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


class KVShiftMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__()
        h, i, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(h, i, bias=bias)
        self.up_proj = nn.Linear(h, i, bias=bias)
        self.down_proj = nn.Linear(i, h, bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class KVShiftExperts(nn.Module):
    """The MLPs of all experts: gate_up_proj [e, 2i, h] and down_proj [e, h, i]."""

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__()
        count, h, i = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(count, h, i))
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """Run each token through its experts and add up their weighted outputs.

        Args:
            x: [t, h].
            chosen: int64 [t, k], the experts of each token.
            shares: fp32 [t, k], their weights.

        Returns:
            [t, h].
        """
        output = torch.zeros_like(x)
        for expert in range(len(self.down_proj)):
            if torch.compiler.is_compiling():
                # One graph cannot depend on how many tokens an expert gets: compute all of them.
                share = shares.where(chosen == expert, 0.0).sum(-1)
                output = output + self._weighted(expert, x, share).to(x.dtype)
                continue
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            if len(token):
                weighted = self._weighted(expert, x[token], shares[token, choice])
                output.index_add_(0, token, weighted.to(x.dtype))
        return output

    def _weighted(self, expert: int, x: Tensor, share: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, self.gate_up_proj[expert]).chunk(2, -1)
        x = nn.functional.linear(self.activation(gate) * up, self.down_proj[expert])
        return x * share[:, None]


class KVShiftSparseMLP(nn.Module):
    """Mixtral's MLP: each token's best experts, weighted by a softmax over their logits."""

    def __init__(self, config: KVShiftLlamaConfig):
        super().__init__()
        self.per_token = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = KVShiftExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = torch.softmax(self.gate(tokens).float(), -1)
        shares, chosen = probabilities.topk(self.per_token, -1)
        shares = shares / shares.sum(-1, keepdim=True)
        return self.experts(tokens, chosen, shares).view_as(x)


__all__ = [
    "KVShiftExperts",
    "KVShiftMLP",
    "KVShiftRMSNorm",
    "KVShiftRotaryEmbedding",
    "KVShiftSparseMLP",
    "rotate",
]
