"""Read a Hugging Face config.json as an Architecture, for every supported layout.

The files are read as JSON: no class of Transformers and no code from the folder is loaded.
"""

from pathlib import Path
from typing import Any, NoReturn

import torch

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.convert.architecture import Architecture, Llama3RopeScaling
from kvshift_megatron.convert.config_fields import check_config
from kvshift_megatron.convert.library_defaults import with_defaults
from kvshift_megatron.utils.field_kinds import short

_MODEL_TYPES = {
    "kvshift_llama": "kvshift",
    "baichuan_m1": "baichuan_m1",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mixtral": "mixtral",
}


class _Config:
    """A config.json, with error messages that name the file and the field.

    A field that the file leaves out has the library's default.
    """

    def __init__(self, fields: dict, file: Path, layout: str):
        self.fields, self.file = with_defaults(fields, layout), file

    def get(self, name: str, default: Any = None) -> Any:
        return default if self.fields.get(name) is None else self.fields[name]

    def need(self, name: str) -> Any:
        if self.fields.get(name) is None:
            raise ValueError(f"{self.file} lacks {name}")
        return self.fields[name]

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.need(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.file}: {name}={value!r} must be a positive whole number")
        return value

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ValueError(f"{self.file}: {name}={short(self.fields.get(name))} {why}")


def layout_of(fields: dict, file: Path) -> str:
    """Return the layout of a config.json.

    Raises:
        ValueError: Its model_type cannot be converted, or a field has another type or range.
    """
    check_config(fields, file)
    model_type = fields.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise ValueError(
            f"{file}: model_type={model_type!r} cannot be converted: it has to be one of "
            f"{', '.join(_MODEL_TYPES)}"
        )
    return _MODEL_TYPES[model_type]


def architecture_from_config(fields: dict, file: Path, dtype: torch.dtype) -> Architecture:
    """Return the architecture that a config.json describes; the vocabulary is not padded yet.

    Args:
        fields: The file's content.
        file: Path of the file, for messages.
        dtype: Dtype of the stored weights, which the file need not say.

    Raises:
        ValueError: A field is missing, or Megatron cannot honour it; the message names the field.
    """
    layout = layout_of(fields, file)
    config = _Config(fields, file, layout)
    _refuse_what_megatron_lacks(config, layout)
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    # Null means as many as attention heads.
    default_groups = heads if "num_key_value_heads" in config.fields else None
    groups = config.whole("num_key_value_heads", default_groups)
    if heads % groups:
        config.refuse("num_key_value_heads", f"must divide num_attention_heads={heads}")
    if config.get("head_dim") is None and hidden % heads:
        config.refuse("hidden_size", f"must be a multiple of num_attention_heads={heads}")
    theta, scaling = _rope(config, layout)
    bias = _biases(config, layout)
    experts = _experts(config, layout)
    vocab = config.whole("vocab_size")
    if config.get("max_position_embeddings") is None and layout == "baichuan_m1":
        positions = config.whole("model_max_length")
    else:
        positions = config.whole("max_position_embeddings")
    return Architecture(
        num_layers=config.whole("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=config.whole("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=config.whole("head_dim", hidden // heads),
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_position_embeddings=positions,
        norm_epsilon=float(config.need("rms_norm_eps")),
        rotary_base=theta,
        rope_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_layernorm=layout == "qwen3" or (layout == "kvshift" and config.get("qk_norm", False)),
        num_experts=experts,
        moe_router_topk=config.whole("num_experts_per_tok", 2) if experts else 2,
        kv_shift=_kv_shift(config, layout),
        dtype=dtype,
        **bias,
    )


def _refuse_what_megatron_lacks(config: _Config, layout: str) -> None:
    if config.get("quantization_config") is not None:
        config.refuse("quantization_config", "cannot be converted: dequantize the model first")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        config.refuse("hidden_act", "cannot be converted: the MLP has to be SwiGLU ('silu')")
    layers = config.get("layer_types", [])
    if layout == "baichuan_m1":
        if config.need("sliding_window_layers"):
            config.refuse(
                "sliding_window_layers",
                "cannot be converted: global-attention layers only, so it has to be []",
            )
        if config.whole("conv_window") != 2:
            config.refuse("conv_window", "cannot be converted: it has to be 2")
        if config.get("tie_word_embeddings", False):
            config.refuse("tie_word_embeddings", "cannot be converted: clients need an lm_head")
        return
    if any(kind != "full_attention" for kind in layers):
        config.refuse("layer_types", "cannot be converted: every layer has to be full_attention")
    window, positions = _window(config, layout), config.get("max_position_embeddings", 0)
    if window is not None and window < positions:
        raise ValueError(
            f"{config.file}: sliding_window={window} is below max_position_embeddings={positions}, "
            "but KV shifting has no sliding window in Hugging Face's layouts: set it to null if "
            "the model was trained without"
        )


def _window(config: _Config, layout: str) -> int | None:
    """Return the length of the window that some layer has in Transformers."""
    if layout in ("qwen2", "qwen3"):
        if not config.get("use_sliding_window", False):
            return None
        # The layers from this one on have it, unless layer_types says which.
        first = config.get("max_window_layers", 0)
        if config.get("layer_types") is not None or first >= config.whole("num_hidden_layers"):
            return None
    return config.get("sliding_window")


def _rope(config: _Config, layout: str) -> tuple[float, Llama3RopeScaling | None]:
    """Read rope_parameters (Transformers 5) or rope_theta and rope_scaling (older releases)."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    theta = config.get("rope_theta", 10_000.0)
    if layout == "baichuan_m1":
        theta = config.need("rope_theta")
    rope = _complete_rope(config, field, theta)
    # Which of the two counts depends on the release of Transformers.
    if config.get("rope_scaling") and _complete_rope(config, "rope_scaling", theta) != rope:
        config.refuse("rope_scaling", "is not rope_parameters: leave out the wrong one")
    theta = rope["rope_theta"]
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(
            f"{config.file}: partial_rotary_factor={partial} cannot be converted: it has to be 1.0"
        )
    kind = rope["rope_type"]
    if kind == "default":
        return float(theta), None
    if kind != "llama3" or layout == "baichuan_m1":
        config.refuse(field, "cannot be converted: rope_type has to be 'default' or 'llama3'")
    try:
        scaling = Llama3RopeScaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        config.refuse(field, f"lacks {error.args[0]}")
    name = "original_max_position_embeddings"
    if config.get(name, rope[name]) != rope[name]:
        config.refuse(name, f"is not that of {field}: leave out the wrong one")
    return float(theta), scaling


def _complete_rope(config: _Config, field: str, theta: Any) -> dict:
    """Return the field as Transformers completes it."""
    rope = dict(config.get(field, {}))
    if any(isinstance(value, dict) for value in rope.values()):
        config.refuse(field, "cannot be converted: it has to be the same for all layers")
    older_type = rope.pop("type", None)
    rope.setdefault("rope_type", older_type or "default")
    rope.setdefault("rope_theta", theta)
    if rope.get("partial_rotary_factor", 0) is None:
        del rope["partial_rotary_factor"]
    return rope


def _biases(config: _Config, layout: str) -> dict[str, bool]:
    if layout == "qwen2":
        return {"add_qkv_bias": True}
    attention, mlp = config.get("attention_bias", False), config.get("mlp_bias", False)
    qkv = layout == "kvshift" and config.get("qkv_bias", False)
    experts = config.get("num_local_experts", 0)
    if attention != mlp or (attention and experts):
        raise ValueError(
            f"{config.file}: attention_bias={attention} with mlp_bias={mlp} cannot be converted: "
            "Megatron has biases on all linear layers of a dense model (both true), on none of "
            "them, or on queries, keys and values only"
        )
    return {"add_bias_linear": bool(attention), "add_qkv_bias": bool(qkv and not attention)}


def _experts(config: _Config, layout: str) -> int:
    if layout == "mixtral":
        experts = config.whole("num_local_experts")
    else:
        experts = config.get("num_local_experts", 0) if layout == "kvshift" else 0
    if experts and not 2 <= config.whole("num_experts_per_tok", 2) <= experts:
        config.refuse(
            "num_experts_per_tok",
            f"cannot be converted: it has to be from 2 to num_local_experts={experts} (with one "
            "expert per token Megatron's router needs a softmax over all experts, and Mixtral's "
            "gives that expert the weight 1)",
        )
    return experts


def _kv_shift(config: _Config, layout: str) -> KVShiftConfig | None:
    if layout == "baichuan_m1":
        return KVShiftConfig(init="identity")
    if layout != "kvshift":
        return None
    variant = config.get("kv_shift_variant", "free")
    try:
        return KVShiftConfig(
            variant=variant,
            window=config.get("kv_shift_window", 2),
            shift_keys=config.get("kv_shift_keys", True),
            shift_values=config.get("kv_shift_values", True),
            init="uniform" if variant == "gate" else "identity",
        )
    except ValueError as error:
        raise ValueError(f"{config.file}: kv_shift: {error}") from error
