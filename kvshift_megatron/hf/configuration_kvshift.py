"""The configuration of a KV-shifting Llama.

This file and modeling_kvshift.py are copied into exported folders, where they run without this
package: they import transformers, torch and each other only.
"""

from transformers import LlamaConfig

VARIANTS = ("free", "gate", "clamp")
ROPE_TYPES = ("default", "llama3")

# The `auto_map` of a config.json beside this file and its neighbours.
AUTO_MAP = {
    "AutoConfig": "configuration_kvshift.KVShiftLlamaConfig",
    "AutoModel": "modeling_kvshift.KVShiftLlamaModel",
    "AutoModelForCausalLM": "modeling_kvshift.KVShiftLlamaForCausalLM",
}


class KVShiftLlamaConfig(LlamaConfig):
    """LlamaConfig with taps: K^_i = sum_j alpha_j K_{i-j+1}, V^_i = sum_j beta_j V_{i-j+1}.

    Source: arXiv 2411.19574, Eq. 5 (windows above 2: Fig. 8c).

    Args (besides LlamaConfig's, which keep their meaning):
        kv_shift_variant: what the parameters mean. ``free``: each is a tap. ``gate``: one logit a
            KV head, alpha_1 = sigmoid(alpha_logit), alpha_2 = 1 - alpha_1 (window 2 only).
            ``clamp``: each tap is its parameter clamped to [0, 1].
        kv_shift_window: taps per key or value, in tokens: 2, 3 or 4.
        kv_shift_keys, kv_shift_values: what is shifted; the other has no taps.
        kv_shift_cache_history: how many of the last tokens a dynamic cache can be cropped by: it
            keeps that many keys and values as they were before the shift, beside the shifted ones.
            None: no limit, for twice the memory. `cache.activate_past_recording()` lifts the limit
            until the next crop.
        qk_norm: RMSNorm of every head's query and key, before the shift (as in Qwen3).
        qkv_bias: biases of q, k and v only (as in Qwen2); ``attention_bias`` adds one to o as well.
        num_local_experts: 0: a dense MLP. Otherwise that many experts in every layer, of which
            each token uses ``num_experts_per_tok``, weighted by a softmax over their logits (as in
            Mixtral; there is no auxiliary loss here).
        rope_parameters: ``rope_type`` "default" or "llama3".

    Raises:
        ValueError: an impossible or unsupported setting; the message names the field.
    """

    model_type = "kvshift_llama"
    # The library's plans split the KV heads and would leave the taps whole.
    base_model_tp_plan = None
    base_model_pp_plan = None
    # Mixtral's block reads it.
    router_jitter_noise = 0.0

    kv_shift_variant: str = "free"
    kv_shift_window: int = 2
    kv_shift_keys: bool = True
    kv_shift_values: bool = True
    kv_shift_cache_history: int | None = 1024
    qk_norm: bool = False
    qkv_bias: bool = False
    num_local_experts: int = 0
    num_experts_per_tok: int = 2

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_kv_shift()
        self._check_the_rest()

    def save_pretrained(self, *args, **kwargs):
        """As PretrainedConfig's; the folder is for AutoModel and AutoModelForCausalLM alike."""
        if self._auto_class is not None:
            self.auto_map = AUTO_MAP | (getattr(self, "auto_map", None) or {})
        super().save_pretrained(*args, **kwargs)

    def _check_kv_shift(self):
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

    def _check_the_rest(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters: rope_type={rope.get('rope_type')!r} is not supported here: "
                f"choose one of {', '.join(ROPE_TYPES)}"
            )
        experts, used = self.num_local_experts, self.num_experts_per_tok
        if experts < 0 or (experts and not 1 <= used <= experts):
            raise ValueError(
                f"num_local_experts={experts} with num_experts_per_tok={used} is impossible: use 0 "
                "for a dense MLP, or at least as many experts as each token uses"
            )
        if experts and self.mlp_bias:
            raise ValueError("mlp_bias=True is not supported with experts: turn it off")
        # What Llama's classes would pass over in silence.
        unsupported = {
            "pretraining_tp": (self.pretraining_tp, (None, 1)),
            "sliding_window": (getattr(self, "sliding_window", None), (None,)),
            "attention_chunk_size": (getattr(self, "attention_chunk_size", None), (None,)),
            "partial_rotary_factor": (rope.get("partial_rotary_factor"), (None, 1, 1.0)),
            "is_causal": (getattr(self, "is_causal", None), (None, True)),
            "layer_types": (
                set(getattr(self, "layer_types", None) or ()) - {"full_attention"},
                (set(),),
            ),
        }
        for name, (value, allowed) in unsupported.items():
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r} is not supported by a KV-shifting Llama: leave it out"
                )

    def tap_names(self) -> dict[str, tuple[str, ...]]:
        """Parameter names by what they shift, current token first; {} for what is not shifted."""
        names = {}
        for kind, prefix, shifted in (
            ("key", "alpha", self.kv_shift_keys),
            ("value", "beta", self.kv_shift_values),
        ):
            if shifted and self.kv_shift_variant == "gate":
                names[kind] = (f"{prefix}_logit",)
            elif shifted:
                names[kind] = tuple(f"{prefix}_{j}" for j in range(1, self.kv_shift_window + 1))
        return names


__all__ = ["KVShiftLlamaConfig"]
