"""Weights are loaded with the settings that they were saved with, or not at all."""

import json
from itertools import permutations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kvshift_megatron.hf import KVShiftLlamaForCausalLM
from tests.hf.models import tiny_model

SETTINGS = [
    {},
    {"kv_shift_variant": "clamp"},
    {"kv_shift_variant": "gate"},
    {"kv_shift_window": 3},
    {"kv_shift_keys": False},
    {"kv_shift_values": False},
]
DEFAULTS = {
    "kv_shift_variant": "free",
    "kv_shift_window": 2,
    "kv_shift_keys": True,
    "kv_shift_values": True,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = []
    for number, options in enumerate(SETTINGS):
        folder = tmp_path_factory.mktemp(f"saved-{number}")
        tiny_model(**options).save_pretrained(folder)
        made.append(folder)
    return made


def load_with_arguments(folder, options):
    return KVShiftLlamaForCausalLM.from_pretrained(folder, **options)


def load_by_auto_class(folder, options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_with_a_configuration(folder, options):
    config = AutoConfig.from_pretrained(folder)
    for name, value in options.items():
        setattr(config, name, value)
    return AutoModel.from_pretrained(folder, config=config)


WAYS = [load_with_arguments, load_by_auto_class, load_with_a_configuration]


OTHERS = [
    (load_with_arguments, saved, asked) for saved, asked in permutations(range(len(SETTINGS)), 2)
] + [(way, saved, asked) for way in WAYS[1:] for saved, asked in [(0, 1), (1, 0), (0, 3), (4, 5)]]


@pytest.mark.parametrize(("way", "saved", "asked"), OTHERS)
def test_other_settings_than_the_saved_ones_are_refused(folders, way, saved, asked):
    before, after = DEFAULTS | SETTINGS[saved], DEFAULTS | SETTINGS[asked]
    with pytest.raises(ValueError, match="kv_shift_") as caught:
        way(folders[saved], after)
    named = [name for name in DEFAULTS if before[name] != after[name]]
    said = str(caught.value)
    assert any(f"{n}={before[n]!r}" in said and f"{n}={after[n]!r}" in said for n in named), said
    assert str(folders[saved]) in said


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_the_saved_ones_may_be_repeated(folders, way, number):
    model = way(folders[number], {**SETTINGS[number], "kv_shift_cache_history": 3})
    for name, value in (DEFAULTS | SETTINGS[number]).items():
        assert getattr(model.config, name) == value
    assert model.config.kv_shift_cache_history == 3


@pytest.mark.parametrize(
    ("saved", "changes"),
    [
        (0, {"kv_shift_variant": "gate"}),
        (2, {"kv_shift_variant": "free"}),
        (0, {"kv_shift_window": 3}),
        (3, {"kv_shift_window": 2}),
        (0, {"kv_shift_values": False}),
    ],
)
def test_a_changed_config_json_is_noticed_by_the_names_of_the_taps(
    folders, tmp_path, saved, changes
):
    folder = tmp_path / "changed"
    folder.mkdir()
    for path in folders[saved].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=r"changed holds the taps .*: correct config.json"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_loading_information_is_given_to_those_who_ask(folders):
    model, info = AutoModelForCausalLM.from_pretrained(folders[0], output_loading_info=True)
    assert isinstance(model, KVShiftLlamaForCausalLM) and not info["missing_keys"]


def test_a_model_without_taps_is_still_a_start(tmp_path):
    config = tiny_model().config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
             "num_attention_heads", "num_key_value_heads")  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}))
    llama.save_pretrained(tmp_path)
    model = KVShiftLlamaForCausalLM.from_pretrained(tmp_path, config=config)
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)
    taps = [p for name, p in model.named_parameters() if "alpha" in name or "beta" in name]
    assert taps and all(tap.isfinite().all() for tap in taps)
