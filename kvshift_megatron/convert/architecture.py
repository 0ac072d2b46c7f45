"""Architecture: what a model is, in Megatron's words and independent of any file format."""

from dataclasses import dataclass

import torch

from kvshift_megatron.config import KVShiftConfig


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3's scaling of the rotary frequencies, with its four parameters."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Everything that the weights' names, shapes and meaning depend on.

    RMSNorm, SwiGLU and RoPE over the whole head throughout. Sizes are of the whole model.

    Args:
        ffn_hidden_size: of the dense MLP, or of one expert where there are experts.
        vocab_size: tokens that exist; padded_vocab_size: rows of the embedding in Megatron.
        tied: the output layer is the embedding (share_embeddings_and_output_weights).
        add_bias_linear: biases on every linear layer, attention and MLP (Megatron's flag).
        add_qkv_bias: biases on queries, keys and values only.
        num_experts: 0 for a dense MLP in every layer; otherwise experts in every layer, the
            router's softmax over the chosen ones (moe_router_topk of them).
        kv_shift: None for vanilla attention.
        dtype: of the weights.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    rotary_base: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    tied: bool = False
    qk_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    num_experts: int = 0
    moe_router_topk: int = 2
    kv_shift: KVShiftConfig | None = None
    dtype: torch.dtype = torch.float32

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def has_qkv_bias(self) -> bool:
        """Queries, keys and values have a bias, by either of Megatron's flags."""
        return self.add_bias_linear or self.add_qkv_bias

    def size(self, name: str) -> int:
        """An axis of a Megatron tensor by the name that `name_map` gives it, in elements."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        return {
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "2ffn": 2 * self.ffn_hidden_size,
            "qkv": (heads + 2 * groups) * self.kv_channels,
            "attention": heads * self.kv_channels,
            "head": self.kv_channels,
            "groups": groups,
            "vocab": self.padded_vocab_size,
            "experts": self.num_experts,
        }[name]
