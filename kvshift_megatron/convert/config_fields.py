"""One table of what every field that the converter reads may hold: its type and its range.

`config.json` and the arguments in a Megatron checkpoint come from anybody. Checked against these
tables first, they can neither be misread (the word "false" as true) nor end in a traceback. Whether
the values fit each other and the tensors is for those who use them.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from kvshift_megatron.config import Variant
from kvshift_megatron.utils.field_kinds import (
    FFN,
    FLAG,
    HEADS,
    HIDDEN,
    LAYERS,
    OBJECT,
    PLAIN,
    Kind,
    either,
    list_of,
    needed,
    number,
    or_null,
    short,
    whole,
    words,
)

_VOCAB = _POSITIONS = _MULTIPLE = whole(1, 2**31 - 1)
_EPSILON, _THETA, _FACTOR = number(1e-30, 1.0), number(1.0, 1e30), number(1e-6, 1e6)
_TOKEN = whole(-1, 2**31 - 1)  # old files say -1 for none

_ROPE = {
    "rope_theta": _THETA,
    "rope_type": words(),
    "type": words(),
    "factor": _FACTOR,
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "original_max_position_embeddings": _POSITIONS,
    "partial_rotary_factor": or_null(_FACTOR),  # Transformers 5.0 may write null
}
# A field of an object is written OBJECT.FIELD. null counts as not given, except in an object.
_CONFIG: dict[str, Kind] = {
    "model_type": words(),
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEADS,
    "vocab_size": _VOCAB,
    "max_position_embeddings": _POSITIONS,
    "model_max_length": _POSITIONS,
    "original_max_position_embeddings": _POSITIONS,
    "rms_norm_eps": _EPSILON,
    "hidden_act": needed(words()),
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "qkv_bias": FLAG,
    "qk_norm": FLAG,
    "use_sliding_window": FLAG,
    "sliding_window": _POSITIONS,
    "max_window_layers": whole(0, 10_000),
    "sliding_window_layers": list_of(whole(0, 10_000)),
    "layer_types": list_of(words()),
    "conv_window": whole(1, 2**16),
    "num_local_experts": needed(whole(0, 10_000)),
    "num_experts_per_tok": needed(whole(1, 10_000)),
    "rope_theta": _THETA,
    "partial_rotary_factor": _FACTOR,
    "rope_parameters": OBJECT,
    **{f"rope_parameters.{name}": kind for name, kind in _ROPE.items()},
    "rope_scaling": OBJECT,
    **{f"rope_scaling.{name}": kind for name, kind in _ROPE.items()},
    "kv_shift_variant": needed(words(*get_args(Variant))),
    "kv_shift_window": needed(whole(2, 4)),
    "kv_shift_keys": needed(FLAG),
    "kv_shift_values": needed(FLAG),
    "kv_shift_cache_history": whole(0, 2**31 - 1),
    "use_cache": FLAG,
    "initializer_range": number(0.0, 1e6),
    "attention_dropout": number(0.0, 1.0),
    "output_router_logits": FLAG,
    "router_aux_loss_coef": number(0.0, 1e6),
    "router_jitter_noise": number(0.0, 1.0),
    "kvshift_padding": OBJECT,
    "kvshift_padding.hidden_size": HIDDEN,
    "kvshift_padding.head_dim": HEADS,
    "kvshift_padding.intermediate_size": or_null(FFN),
    "kvshift_padding.rms_norm_eps": _EPSILON,
    "kvshift_padding.rope_theta": _THETA,
    "kvshift_padding.row_length": number(1e-30, 1e30),
    "bos_token_id": either(_TOKEN, list_of(_TOKEN)),
    "eos_token_id": either(_TOKEN, list_of(_TOKEN)),
    "pad_token_id": _TOKEN,
}
_ARGUMENTS: dict[str, Kind] = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "moe_ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "group_query_attention": FLAG,
    "num_query_groups": HEADS,
    "kv_channels": HEADS,
    "vocab_size": _VOCAB,
    "padded_vocab_size": _VOCAB,
    "tokenizer_vocab_size": _VOCAB,
    "special_tokens": list_of(words()),
    "make_vocab_size_divisible_by": _MULTIPLE,
    "tensor_model_parallel_size": _MULTIPLE,
    "max_position_embeddings": _POSITIONS,
    "layernorm_epsilon": _EPSILON,
    "norm_epsilon": _EPSILON,
    "rotary_base": _THETA,
    "use_rope_scaling": FLAG,
    "rope_scaling_factor": _FACTOR,
    "untie_embeddings_and_output_weights": FLAG,
    "qk_layernorm": FLAG,
    "add_bias_linear": FLAG,
    "add_qkv_bias": FLAG,
    "num_experts": whole(0, 10_000),
    "moe_router_topk": whole(1, 10_000),
    "no_kv_shift": FLAG,
    "kv_shift_variant": words(*get_args(Variant)),
    "kv_shift_window": whole(2, 4),
    "no_kv_shift_keys": FLAG,
    "no_kv_shift_values": FLAG,
    "hf_config_fields": OBJECT,
}
_LEAVE_OUT = object()


def check_config(fields: Mapping[str, Any], file: Path) -> None:
    """Check every field of a config.json that the converter reads.

    Raises:
        ValueError: A field has another type, or is out of range; the message names file and field.
    """
    _check(_CONFIG, fields, f"{file}: ")
    if fields.get("model_type") == "qwen3" and fields.get("head_dim", 1) is None:
        raise ValueError(
            f"{file}: head_dim=None must be a whole number: qwen3 has no other default"
        )
    kinds, layers = fields.get("layer_types"), fields.get("num_hidden_layers")
    if kinds is not None and layers is not None and len(kinds) != layers:
        raise ValueError(
            f"{file}: layer_types has {len(kinds)} entries, but num_hidden_layers={layers}"
        )
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if "kvshift_padding" not in fields and heads and hidden:
        width = fields.get("head_dim", 128 if fields.get("model_type") == "qwen3" else None)
        _check_even(f"{file}: head_dim", hidden // heads if width is None else width)


def check_arguments(arguments: Namespace, checkpoint: Path, compared: Iterable[str]) -> None:
    """Check every training argument of a Megatron checkpoint that the converter reads.

    Args:
        arguments: The arguments; None counts as not given.
        checkpoint: The checkpoint's folder, for messages.
        compared: Further arguments, which will be compared with plain values.

    Raises:
        ValueError: An argument has another type, is out of range, or lacks what belongs to it; the
            message names the checkpoint and the argument.
    """
    given = vars(arguments)
    where = f"{checkpoint}: in the checkpoint's arguments, "
    _check({**dict.fromkeys(compared, PLAIN), **_ARGUMENTS}, given, where)
    if carried := given.get("hf_config_fields"):
        _check(_CONFIG, carried, f"{where}hf_config_fields.")
    partners = {
        "group_query_attention": "num_query_groups",
        "use_rope_scaling": "rope_scaling_factor",
    }
    for flag, name in partners.items():
        if given.get(flag) and given.get(name) is None:
            raise ValueError(f"{where}{name} is missing, which {flag} needs")
    heads, groups = given.get("num_attention_heads"), given.get("num_query_groups")
    if given.get("group_query_attention") and heads and heads % groups:
        raise ValueError(
            f"{where}num_query_groups={groups} must divide num_attention_heads={heads}"
        )
    width, hidden = given.get("kv_channels"), given.get("hidden_size")
    if width is None and heads and hidden:
        if hidden % heads:
            raise ValueError(
                f"{where}hidden_size={hidden} must be a multiple of num_attention_heads={heads}"
            )
        width = hidden // heads
    if width is not None:
        _check_even(f"{where}kv_channels", width)
    experts, used = given.get("num_experts"), given.get("moe_router_topk")
    if experts and "moe_router_topk" in given and (used is None or used > experts):
        raise ValueError(f"{where}moe_router_topk={used} must not be above num_experts={experts}")


def _check_even(name: str, width: int) -> None:
    if width % 2:
        raise ValueError(f"{name}={width} must be even: RoPE rotates channels in pairs")


def _check(kinds: Mapping[str, Kind], fields: Mapping[str, Any], where: str) -> None:
    for name, kind in kinds.items():
        outer, dot, inner = name.partition(".")
        value = fields.get(outer, _LEAVE_OUT)
        if value is _LEAVE_OUT or (value is None and (dot or kind.optional)):
            continue
        if dot:
            value = value.get(inner, _LEAVE_OUT)
        if value is not _LEAVE_OUT and not kind.accepts(value):
            raise ValueError(f"{where}{name}={short(value)} must be {kind.expected}")
        if kind is OBJECT:
            _check_flat(name, value, where)


def _check_flat(name: str, value: dict, where: str) -> None:
    for inner, item in value.items():
        if isinstance(item, dict):
            raise ValueError(
                f"{where}{name}.{inner!r:.60} is an object, but it "
                "has to be the same for all layers"
            )
