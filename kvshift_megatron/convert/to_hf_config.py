"""Write an Architecture as a Hugging Face config.json, for every supported layout."""

from typing import Any

from kvshift_megatron.convert.architecture import Architecture

_CLASSES = {
    "kvshift": "KVShiftLlama",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
}


def config_from_architecture(layout: str, architecture: Architecture) -> dict:
    """Return the config.json of a model in a layout.

    Raises:
        ValueError: The layout has no place for something; the message names it.
    """
    arch = architecture
    _refuse_what_the_layout_lacks(layout, arch)
    fields = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.norm_epsilon,
        "tie_word_embeddings": arch.tied,
        "dtype": str(arch.dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if layout == "baichuan_m1":
        return {
            "architectures": ["BaichuanM1ForCausalLM"],
            "model_type": "baichuan_m1",
            **fields,
            "rope_theta": arch.rotary_base,
            "sliding_window": arch.max_position_embeddings,
            "sliding_window_layers": [],
            "conv_window": 2,
        }
    fields["head_dim"] = arch.kv_channels
    fields["rope_parameters"] = _rope_parameters(arch)
    head = {
        "architectures": [f"{_CLASSES[layout]}ForCausalLM"],
        "model_type": "kvshift_llama" if layout == "kvshift" else layout,
    }
    return {**head, **fields, **_own_fields(layout, arch)}


def _rope_parameters(arch: Architecture) -> dict:
    if arch.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": arch.rotary_base}
    scaling = arch.rope_scaling
    return {
        "rope_type": "llama3",
        "rope_theta": arch.rotary_base,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _own_fields(layout: str, arch: Architecture) -> dict[str, Any]:
    """Return the fields that not all layouts have."""
    experts = {"num_local_experts": arch.num_experts, "num_experts_per_tok": arch.moe_router_topk}
    if layout in ("kvshift", "llama"):
        biases = {"attention_bias": arch.add_bias_linear, "mlp_bias": arch.add_bias_linear}
        if layout == "llama":
            return biases
        assert arch.kv_shift is not None  # checked by _refuse_what_the_layout_lacks
        return {
            **biases,
            **experts,
            "qkv_bias": arch.add_qkv_bias and not arch.add_bias_linear,
            "qk_norm": arch.qk_layernorm,
            "kv_shift_variant": arch.kv_shift.variant,
            "kv_shift_window": arch.kv_shift.window,
            "kv_shift_keys": arch.kv_shift.shift_keys,
            "kv_shift_values": arch.kv_shift.shift_values,
        }
    fields: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": None},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False, "attention_bias": False},
        "mixtral": {**experts, "sliding_window": None},
    }
    return fields[layout]


def _refuse_what_the_layout_lacks(layout: str, arch: Architecture) -> None:
    shift = arch.kv_shift
    has = {
        "taps": shift is not None,
        "experts": arch.num_experts > 0,
        "qk_layernorm": arch.qk_layernorm,
        "add_qkv_bias": arch.add_qkv_bias and not arch.add_bias_linear,
        "add_bias_linear": arch.add_bias_linear,
        "rope scaling": arch.rope_scaling is not None,
        "a window above 2 tokens": shift is not None and shift.window > 2,
        "keys or values that are not shifted": shift is not None
        and not (shift.shift_keys and shift.shift_values),
        "heads that do not add up to the hidden size": arch.num_attention_heads * arch.kv_channels
        != arch.hidden_size,
    }
    odd_heads = "heads that do not add up to the hidden size"
    shifts = {"a window above 2 tokens", "keys or values that are not shifted"}
    # Layout -> what it may have, what it must have.
    may, must = {
        "kvshift": ({*has}, {"taps"}),
        "baichuan_m1": ({"taps"}, {"taps"}),
        "llama": ({"add_bias_linear", "rope scaling", odd_heads}, set()),
        "mistral": ({"rope scaling", odd_heads}, set()),
        "qwen2": ({"add_qkv_bias", "rope scaling"}, {"add_qkv_bias"}),
        "qwen3": ({"qk_layernorm", "rope scaling", odd_heads}, {"qk_layernorm"}),
        "mixtral": ({"experts", "rope scaling", odd_heads}, {"experts"}),
    }[layout]
    for name, is_there in has.items():
        if is_there and name not in may and not (name in shifts and "taps" not in may):
            raise ValueError(
                f"the layout {layout} has no place for {name}, which the model has"
                + (": use --layout kvshift" if shift is not None else "")
            )
        if name in must and not is_there:
            raise ValueError(
                f"the layout {layout} is for models with {name}, but this model has none"
            )
    if arch.num_experts and arch.add_bias_linear:
        raise ValueError("experts with biases (add_bias_linear) have no place in any layout")
