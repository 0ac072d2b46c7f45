"""The configuration of a KV-shifting Llama.

The files in this folder whose names end in _kvshift are copied into exported folders and run there
without this package: they import only transformers, torch and each other.
"""

from typing import Any

from .compatibility_kvshift import PreTrainedConfig

VARIANTS = ("free", "gate", "clamp")
# rope_type -> the rope_parameters that it needs.
ROPE_TYPES = {
    "default": ("rope_theta",),
    "llama3": (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
# Settings of other models, and the values of them that change nothing.
UNSUPPORTED: dict[str, tuple] = {
    "pretraining_tp": (1,),
    "sliding_window": (),
    "attention_chunk_size": (),
    "partial_rotary_factor": (1,),
    "is_causal": (True,),
    "layer_types": (),
}

# The `auto_map` of a config.json that lies beside this file.
AUTO_MAP = {
    "AutoConfig": "configuration_kvshift.KVShiftLlamaConfig",
    "AutoModel": "modeling_kvshift.KVShiftLlamaModel",
    "AutoModelForCausalLM": "modeling_kvshift.KVShiftLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_kvshift.KVShiftLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_kvshift.KVShiftLlamaForTokenClassification",
}


class KVShiftLlamaConfig(PreTrainedConfig):
    """A Llama with taps: K^_i = sum_j alpha_j K_{i-j+1}, V^_i = sum_j beta_j V_{i-j+1}.

    Source: arXiv 2411.19574, Eq. 5 (windows above 2: Fig. 8c). Fields that LlamaConfig also has
    mean the same and have its defaults.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: Sizes.
        num_key_value_heads: None: As many as attention heads.
        head_dim: None: hidden_size / num_attention_heads.
        hidden_act: Activation of the MLP, by its name in Transformers.
        max_position_embeddings: Number of tokens; informative only.
        initializer_range: Standard deviation of the initial weights.
        rms_norm_eps: Added to the mean square.
        use_cache: Whether calls return a cache by default.
        pad_token_id, bos_token_id, eos_token_id: Token ids, or None (eos may be a list).
        tie_word_embeddings: Use one matrix for the embedding and the output layer.
        rope_parameters: ``rope_type`` "default" or "llama3", ``rope_theta``, and for llama3
            ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
            ``original_max_position_embeddings``. The older ``rope_theta`` and ``rope_scaling`` are
            also read.
        attention_bias: Biases of q, k, v and o.
        attention_dropout: Probability, in training.
        mlp_bias: Biases of a dense MLP.
        kv_shift_variant: What the parameters mean. ``free``: Each is a tap. ``gate``: One logit per
            KV head, alpha_1 = sigmoid(alpha_logit), alpha_2 = 1 - alpha_1 (window 2 only).
            ``clamp``: Each tap is its parameter clamped to [0, 1].
        kv_shift_window: Taps per key or value, in tokens: 2, 3 or 4.
        kv_shift_keys, kv_shift_values: Whether to shift them; if not, they have no taps.
        kv_shift_cache_history: How many of the last tokens a dynamic cache can be cropped by: it
            holds that many keys and values from before the shift, in addition to the shifted ones.
            None: No limit, for twice the memory. `cache.activate_past_recording()` lifts the limit
            until the next crop.
        qk_norm: RMSNorm of every head's query and key, before the shift (as in Qwen3).
        qkv_bias: Biases of q, k and v only (as in Qwen2); ``attention_bias`` also adds one to o.
        num_local_experts: 0: A dense MLP. Otherwise every layer has that many experts, and each
            token uses ``num_experts_per_tok`` of them, weighted by a softmax over their logits (as
            in Mixtral, but without auxiliary loss).
        num_experts_per_tok: See num_local_experts.

    Raises:
        ValueError: A setting is impossible or unsupported; the message names the field.
    """

    model_type = "kvshift_llama"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        rope_parameters: dict | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        mlp_bias: bool = False,
        kv_shift_variant: str = "free",
        kv_shift_window: int = 2,
        kv_shift_keys: bool = True,
        kv_shift_values: bool = True,
        kv_shift_cache_history: int | None = 1024,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        num_local_experts: int = 0,
        num_experts_per_tok: int = 2,
        **kwargs: Any,
    ):
        if num_key_value_heads is None:
            num_key_value_heads = num_attention_heads
        if head_dim is None:
            head_dim = hidden_size // num_attention_heads
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_parameters = _rope_parameters(rope_parameters, kwargs)
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        self.kv_shift_variant = kv_shift_variant
        self.kv_shift_window = kv_shift_window
        self.kv_shift_keys = kv_shift_keys
        self.kv_shift_values = kv_shift_values
        self.kv_shift_cache_history = kv_shift_cache_history
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self._check_kv_shift()
        self._check_rope()
        self._check_the_rest(kwargs)
        super().__init__(**kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as PreTrainedConfig does, with an auto_map for every Auto class."""
        self.auto_map = AUTO_MAP | (getattr(self, "auto_map", None) or {})
        super().save_pretrained(*args, **kwargs)

    def _check_kv_shift(self) -> None:
        variant, window = self.kv_shift_variant, self.kv_shift_window
        if variant not in VARIANTS:
            raise ValueError(
                f"kv_shift_variant={variant!r} is unknown: choose one of {', '.join(VARIANTS)}"
            )
        if isinstance(window, bool) or not isinstance(window, int) or not 2 <= window <= 4:
            raise ValueError(
                f"kv_shift_window={window!r} must be 2, 3 or 4 tokens (1 would be vanilla "
                "attention: use LlamaConfig for that)"
            )
        if variant == "gate" and window != 2:
            raise ValueError(
                f"kv_shift_variant='gate' is defined for kv_shift_window=2 only, not {window}: use "
                "kv_shift_variant='free' for a longer window"
            )
        for name in ("kv_shift_keys", "kv_shift_values"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")
        if not (self.kv_shift_keys or self.kv_shift_values):
            raise ValueError(
                "kv_shift_keys and kv_shift_values are both off, which is vanilla attention: turn "
                "one of them on, or use LlamaConfig"
            )
        history = self.kv_shift_cache_history
        if history is not None and (
            isinstance(history, bool) or not isinstance(history, int) or history < 0
        ):
            raise ValueError(
                f"kv_shift_cache_history={history!r} must be a number of tokens, 0 or more, or null"
            )

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        names = ROPE_TYPES.get(rope["rope_type"])
        if names is None:
            raise ValueError(
                f"rope_parameters: rope_type={rope['rope_type']!r} is not supported here: "
                f"choose one of {', '.join(ROPE_TYPES)}"
            )
        for name in names:
            if not isinstance(rope.get(name), int | float) or not rope[name] > 0:
                raise ValueError(
                    f"rope_parameters: {name}={rope.get(name)!r} must be a number above 0 for "
                    f"rope_type={rope['rope_type']!r}"
                )

    def _check_the_rest(self, others: dict) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        experts, used = self.num_local_experts, self.num_experts_per_tok
        if experts < 0 or (experts and not 1 <= used <= experts):
            raise ValueError(
                f"num_local_experts={experts} with num_experts_per_tok={used} is impossible: use 0 "
                "for a dense MLP, or at least as many experts as each token uses"
            )
        if experts and self.mlp_bias:
            raise ValueError("mlp_bias=True is not supported with experts: turn it off")
        # Refuse settings of other models, which this one would otherwise silently ignore.
        others = {**others, "partial_rotary_factor": _partial_rotary_factor(self, others)}
        others["layer_types"] = set(others.get("layer_types") or ()) - {"full_attention"} or None
        for name, allowed in UNSUPPORTED.items():
            if others.get(name) not in (None, *allowed):
                raise ValueError(
                    f"{name}={others[name]!r} is not supported by a KV-shifting Llama: leave it out"
                )

    def tap_names(self) -> dict[str, tuple[str, ...]]:
        """Map "key" and "value", if shifted, to their parameter names, current token first."""
        names: dict[str, tuple[str, ...]] = {}
        for kind, prefix, shifted in (
            ("key", "alpha", self.kv_shift_keys),
            ("value", "beta", self.kv_shift_values),
        ):
            if shifted and self.kv_shift_variant == "gate":
                names[kind] = (f"{prefix}_logit",)
            elif shifted:
                names[kind] = tuple(f"{prefix}_{j}" for j in range(1, self.kv_shift_window + 1))
        return names


def _rope_parameters(given: dict | None, others: dict) -> dict:
    """Return complete `rope_parameters`, removing their older names from `others`."""
    older, theta = others.pop("rope_scaling", None), others.pop("rope_theta", None)
    rope = dict(given or older or {})
    older_type = rope.pop("type", None)
    rope.setdefault("rope_type", older_type or "default")
    rope.setdefault("rope_theta", 10000.0 if theta is None else theta)
    return rope


def _partial_rotary_factor(config: KVShiftLlamaConfig, others: dict) -> float | None:
    return config.rope_parameters.get("partial_rotary_factor", others.get("partial_rotary_factor"))


__all__ = ["KVShiftLlamaConfig"]
