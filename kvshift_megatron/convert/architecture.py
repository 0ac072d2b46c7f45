"""Architecture: what a model is, in Megatron's terms and independent of any file format."""

from dataclasses import dataclass

import torch

from kvshift_megatron.config import KVShiftConfig


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3's scaling of the rotary frequencies."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Everything that the names, shapes and meaning of the weights depend on.

    Every model has RMSNorm, SwiGLU and RoPE over whole heads. Sizes are those of the whole model.

    Args:
        ffn_hidden_size: Size of the dense MLP, or of one expert.
        vocab_size: Number of tokens that exist.
        padded_vocab_size: Rows of the embedding in Megatron.
        tied: The output layer is the embedding (share_embeddings_and_output_weights).
        add_bias_linear: Biases on every linear layer of attention and MLP (Megatron's flag).
        add_qkv_bias: Biases on queries, keys and values only.
        num_experts: 0 for a dense MLP in every layer. Otherwise every layer has that many experts,
            and each token uses moe_router_topk of them, weighted by a softmax over those.
        kv_shift: None for vanilla attention.
        dtype: Dtype of the weights.
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
        """Number of query heads that share one key and value."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias, by either of Megatron's flags."""
        return self.add_bias_linear or self.add_qkv_bias

    def size(self, name: str) -> int:
        """Return the size, in elements, of the axis of a Megatron tensor that `name_map` names."""
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
