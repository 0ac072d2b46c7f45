"""Every field of every layout's configuration class means the same here as in its library."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.convert import library_defaults
from kvshift_megatron.convert.architecture import Llama3RopeScaling
from kvshift_megatron.convert.from_hf_config import architecture_from_config
from kvshift_megatron.convert.megatron_arguments import arguments_from_architecture
from kvshift_megatron.convert.to_hf_config import config_from_architecture
from kvshift_megatron.hf import KVShiftLlamaConfig
from tests.convert import models

FILE = Path("config.json")
# Positions beyond every default window, and a layer that has one if windows are used.
SMALL = {**models.SMALL, "max_position_embeddings": 8192}
OWN: dict[str, dict] = {
    "kvshift": {"num_local_experts": 4},
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"max_window_layers": 1},
    "qwen3": {"max_window_layers": 1},
    "mixtral": {"num_local_experts": 4},
}
CLASSES = {
    "kvshift": KVShiftLlamaConfig,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mixtral": transformers.MixtralConfig,
}
LAYOUTS = list(CLASSES)
# Field -> a value that changes something, for fields whose default is null or not a number.
OTHER = {
    "pad_token_id": 3,
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "head_dim": 16,
    "hidden_act": "gelu",
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 123_000.0},
    "kv_shift_variant": "clamp",
    "kv_shift_cache_history": None,
    "kv_shift_window": 3,
}
# Fields that change nothing in a model that is loaded, by layout, and why.
WITHOUT_EFFECT = {
    ("llama", "pretraining_tp"): "splits a product into parts, with the same result",
    ("qwen2", "max_window_layers"): "has an effect with use_sliding_window only",
    ("qwen3", "max_window_layers"): "has an effect with use_sliding_window only",
    ("qwen2", "sliding_window"): "has an effect with use_sliding_window only",
    ("qwen3", "sliding_window"): "has an effect with use_sliding_window only",
}


def complete(layout, **changes) -> dict:
    """Return all fields as the library completes them."""
    fields = CLASSES[layout](**{**SMALL, **OWN[layout], **changes}).to_dict()
    return json.loads(json.dumps(fields))


def own_fields(layout) -> list[str]:
    general = transformers.PreTrainedConfig().to_dict().keys()
    return [name for name in complete(layout) if name not in general]


def meaning(fields, layout):
    """Return everything that a conversion takes from a config.json, or None if it is refused."""
    try:
        architecture = architecture_from_config(fields, FILE, torch.float32)
        arguments_from_architecture(architecture, 1)
    except ValueError:
        return None
    otherwise = library_defaults.default_token_ids(fields, layout)
    ids = otherwise | library_defaults.stated_token_ids(fields)
    # The library writes out what this package leaves at a default that all layouts have.
    carried = {"initializer_range": 0.02, "attention_dropout": 0.0, "use_cache": True}
    carried |= {"kv_shift_cache_history": 1024, "output_router_logits": False}
    carried |= {"router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0}
    carried |= library_defaults.carried_fields(fields, layout)
    return architecture, ids, carried


def other(name, value):
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    assert isinstance(value, int | float), f"{name}={value!r}: give another value in OTHER"
    return value * 2 or 1


def disagreements(layout) -> list[tuple[str, str]]:
    """Return (changed field, absent field) for which file and library mean different things."""
    found = []
    names, base = own_fields(layout), complete(layout)
    given = {**SMALL, **OWN[layout]}
    # What a field means may depend on a switch.
    switches = [name for name in names if isinstance(base[name], bool)]
    for changed, absent in product(["", *switches], names):
        changes = {changed: not base[changed]} if changed else {}
        fields = {**given, **changes}
        fields.pop(absent, None)
        try:
            expected = meaning(json.loads(json.dumps(CLASSES[layout](**fields).to_dict())), layout)
        except Exception:  # the library refuses it, in errors of many kinds
            continue
        fields["model_type"] = CLASSES[layout].model_type
        fields.setdefault("rms_norm_eps", 1e-5 if layout == "mixtral" else 1e-6)
        here = meaning(fields, layout)
        # A size has to be in the file.
        if here != expected and not (here is None and absent in given):
            found.append((changed, absent))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_absent_field_means_what_the_library_takes_for_it(layout):
    assert disagreements(layout) == []


def test_a_wrong_default_is_noticed(monkeypatch):
    monkeypatch.setattr(library_defaults, "_DEFAULTS", {})
    assert ("", "rope_parameters") in disagreements("mixtral")
    assert ("", "eos_token_id") in disagreements("llama")
    assert ("use_sliding_window", "sliding_window") in disagreements("qwen2")


def test_mistral_without_sliding_window_has_the_librarys(monkeypatch):
    fields = {**SMALL, "rms_norm_eps": 1e-6, "model_type": "mistral"}
    with pytest.raises(ValueError, match="sliding_window=4096 is below max_position_embeddings"):
        architecture_from_config(fields, FILE, torch.float32)
    for changes in ({"sliding_window": None}, {"max_position_embeddings": 4096}):
        architecture_from_config({**fields, **changes}, FILE, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_field_is_honoured_carried_or_refused(layout):
    base, names = complete(layout), own_fields(layout)
    if "use_sliding_window" in base:  # the library drops the window if it is off
        base |= {"sliding_window": 4096, "layer_types": None}
    usual = meaning(base, layout)
    assert usual is not None
    ignored = {
        name for name in names if meaning({**base, name: other(name, base[name])}, layout) == usual
    }
    assert ignored == {name for kind, name in WITHOUT_EFFECT if kind == layout}


ARCHITECTURES = {
    "kvshift": {
        "num_experts": 4,
        "qk_layernorm": True,
        "kv_shift": KVShiftConfig(window=3, shift_keys=False, init="identity"),
    },
    "llama": {"add_bias_linear": True, "rope_scaling": Llama3RopeScaling(4.0)},
    "mistral": {"kv_channels": 16},
    "qwen2": {"add_qkv_bias": True, "tied": True},
    "qwen3": {"qk_layernorm": True},
    "mixtral": {"num_experts": 4},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_library_reads_from_a_written_file_what_was_written(layout):
    arch = models.architecture(
        norm_epsilon=3e-5, max_position_embeddings=8192, padded_vocab_size=59, kv_shift=None
    )
    arch = models.architecture(**{**vars(arch), **ARCHITECTURES[layout]})
    written = config_from_architecture(layout, arch)
    read = CLASSES[layout](**written).to_dict()
    assert architecture_from_config(read, FILE, torch.float32) == arch


def test_two_places_for_the_same_setting_must_agree():
    rope = {"rope_type": "default", "rope_theta": 1e5}
    fields = {**complete("llama"), "rope_parameters": rope}
    same = {"rope_scaling": {"type": "default"}, "rope_theta": 1e5}
    assert architecture_from_config({**fields, **same}, FILE, torch.float32).rotary_base == 1e5
    nulls = {**rope, "partial_rotary_factor": None}  # as Transformers 5.0 writes it
    for name in ("rope_parameters", "rope_scaling"):
        one = {**fields, "rope_theta": 1e5, name: nulls}
        assert architecture_from_config(one, FILE, torch.float32).rotary_base == 1e5
    with pytest.raises(ValueError, match=r"rope_scaling=.* is not rope_parameters"):
        architecture_from_config({**fields, **same, "rope_theta": 2e5}, FILE, torch.float32)
    nested = {"rope_parameters": {"full_attention": rope}}
    with pytest.raises(ValueError, match="has to be the same for all layers"):
        architecture_from_config({**fields, **nested}, FILE, torch.float32)


@pytest.mark.parametrize("used", [1, 5])
def test_experts_that_megatrons_router_cannot_weight_are_refused(used):
    fields = {**complete("mixtral"), "num_experts_per_tok": used}
    with pytest.raises(ValueError, match=f"num_experts_per_tok={used} cannot be converted"):
        architecture_from_config(fields, FILE, torch.float32)
