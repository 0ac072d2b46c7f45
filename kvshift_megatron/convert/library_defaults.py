"""What absent fields of a config.json mean, and which fields Megatron has no place for.

`tests/convert/test_library_defaults.py` compares every field of every layout with the library's own
configuration class.
"""

from typing import Any

_LLAMA_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_WINDOW: dict[str, Any] = {"sliding_window": 4096, "max_window_layers": 28}

# Layout -> field -> default. Sizes are not here: a file has to state them. Neither are fields whose
# default is null, false or the same everywhere.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "kvshift": {**_LLAMA_IDS, "num_key_value_heads": None},
    "llama": {**_LLAMA_IDS, "num_key_value_heads": None},
    "mistral": {**_LLAMA_IDS, "sliding_window": 4096},
    "qwen2": _WINDOW,
    "qwen3": {**_WINDOW, "head_dim": 128},
    "mixtral": {**_LLAMA_IDS, "rope_theta": 1_000_000.0},
}

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields that say nothing about the weights or what they compute in evaluation. A checkpoint carries
# them from one folder to the next.
_OF_ALL = ("initializer_range", "attention_dropout", "use_cache")
_CARRIED = {
    "kvshift": (*_OF_ALL, "kv_shift_cache_history"),
    "mixtral": (*_OF_ALL, "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _OF_ALL),
    "baichuan_m1": (),
}


def with_defaults(fields: dict, layout: str) -> dict:
    """Return the fields with the library's defaults for absent ones; null stays null."""
    return {**_DEFAULTS.get(layout, {}), **fields}


def carried_fields(fields: dict, layout: str) -> dict[str, Any]:
    """Return those fields that have no place in Megatron and that the layout has."""
    return {name: fields[name] for name in _CARRIED[layout] if name in fields}


def stated_token_ids(fields: dict) -> dict[str, Any]:
    """Return the ids of special tokens that a config.json or generation_config.json states."""
    return {name: fields[name] for name in TOKEN_IDS if fields.get(name) is not None}


def default_token_ids(fields: dict, layout: str) -> dict[str, Any]:
    """Return the ids that the library takes for those that config.json leaves out."""
    return {
        name: value
        for name, value in stated_token_ids(_DEFAULTS.get(layout, {})).items()
        if name not in fields
    }
