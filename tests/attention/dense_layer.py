"""A KV-shifting layer written from the paper alone, in float64.

It shares no code with the package or Megatron. From Megatron it takes only the names and the order
of rows in linear_qkv (per query group: queries, key, value) and linear_fc1 (gate, up).

    x: [s, b, h]; per head, with n heads in g groups:
    q, k, v = RMSNorm(x) W_q, W_k, W_v
    k^_i = sum_j alpha_j k_{i-j+1},  v^_i = sum_j beta_j v_{i-j+1},  0 before the first token
    y = x + softmax(R(q) R(k^)^T / sqrt(d) + causal) v^ W_o
    out = y + W_2 (silu(W_g RMSNorm(y)) * W_u RMSNorm(y))
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseLayer:
    """One layer; other values of `lag` and `rotate_first` are errors that tests plant.

    Args:
        heads, groups, head_size: Numbers of query heads and of key-value heads, and their size.
        variant: What a tap's parameter means: free, gate or clamp.
        lag: Tokens between two taps; 1 is right.
        rotate_first: Whether to rotate keys before the shift; False is right.
    """

    heads: int
    groups: int
    head_size: int
    eps: float = 1e-5
    rope_base: float = 100_000.0
    variant: str = "free"
    lag: int = 1
    rotate_first: bool = False

    def __call__(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Apply the layer to float64 [s, b, h], with float64 weights by Megatron's names."""
        h = self.rms_norm(x, weights["input_layernorm.weight"])
        y = x + self.attention(h, weights)
        h = self.rms_norm(y, weights["pre_mlp_layernorm.weight"])
        gate, up = (h @ weights["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        return y + (gate / (1 + torch.exp(-gate)) * up) @ weights["mlp.linear_fc2.weight"].T

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight

    def attention(self, h: Tensor, weights: dict[str, Tensor]) -> Tensor:
        qkv = h @ weights["self_attention.linear_qkv.weight"].T
        per_group = self.heads // self.groups
        context = []
        for group in range(self.groups):
            start = group * (per_group + 2) * self.head_size
            parts = [
                qkv[..., start + i * self.head_size : start + (i + 1) * self.head_size]
                for i in range(per_group + 2)
            ]
            *queries, key, value = parts
            if self.rotate_first:
                key = self.shift(self.rotate(key), self.taps("alpha", weights, group))
            else:
                key = self.rotate(self.shift(key, self.taps("alpha", weights, group)))
            value = self.shift(value, self.taps("beta", weights, group))
            context += [self.attend(self.rotate(query), key, value) for query in queries]
        return torch.cat(context, dim=-1) @ weights["self_attention.linear_proj.weight"].T

    def taps(self, kind: str, weights: dict[str, Tensor], group: int) -> list[Tensor]:
        """Return the taps of one group, current token first; [1] for a kind that does not shift."""
        if self.variant == "gate" and f"self_attention.{kind}_logit" in weights:
            gate = 1 / (1 + torch.exp(-weights[f"self_attention.{kind}_logit"][group]))
            return [gate, 1 - gate]
        taps = []
        while (name := f"self_attention.{kind}_{len(taps) + 1}") in weights:
            tap = weights[name][group]
            if self.variant == "clamp":
                # Clamped, with the derivative 1 everywhere.
                tap = min(max(tap.item(), 0.0), 1.0) + (tap - tap.item())
            taps.append(tap)
        return taps or [torch.ones((), dtype=torch.float64)]

    def shift(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        """Multiply by a matrix over tokens, with taps[j] on diagonal -j."""
        tokens = len(x)
        matrix = sum(
            tap * torch.diag(torch.ones(tokens, dtype=x.dtype), -j * self.lag)[:tokens, :tokens]
            for j, tap in enumerate(taps)
        )
        return torch.einsum("ij,jbh->ibh", matrix, x)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate channels (i, i + d/2) by position * base^(-2i/d), as a complex product."""
        half = self.head_size // 2
        speed = self.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * speed
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("ibh,jbh->bij", query, key) / self.head_size**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = torch.exp(scores.masked_fill(future, -torch.inf))
        return torch.einsum("bij,jbh->ibh", weights / weights.sum(-1, keepdim=True), value)
