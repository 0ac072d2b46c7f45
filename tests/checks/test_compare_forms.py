"""Checkpoints of the other form of the model: which are loaded, and how the others are refused."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from kvshift_megatron.checks import checkpoint
from kvshift_megatron.checks.checkpoint import check_checkpoint
from kvshift_megatron.checks.model_forms import (
    Place,
    form_of,
    gpt_layers,
    gpt_place,
    hybrid_key,
    hybrid_layer,
    pattern_in,
    pattern_of,
)
from tests.checks.models import FREE, IDENTITY, asked_for, build, build_hybrid
from tests.checks.test_checkpoint import arguments, checkpoints

EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Return a function that saves a model and has Megatron's arguments load it for a pattern."""

    def save(model, pattern=None, content=None, **given):
        root = checkpoints(tmp_path / "run", "2")
        directory = Path(root) / "iter_0000002"
        directory.mkdir()
        content = {"singleton_local_shards": False, **(content or {})}
        state = {"model": model.sharded_state_dict(metadata=content)}
        dist_checkpointing.save(state, str(directory), content_metadata=content)
        args = arguments(load=root, hybrid_layer_pattern=pattern, **given)
        monkeypatch.setattr(checkpoint, "megatron_args", lambda: args)
        return directory

    return save


def refused(model, kv_shift, *parts):
    with pytest.raises(ValueError) as caught:
        check_checkpoint([model], kv_shift)
    for part in ["load: the ", "run/iter_0000002", *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- keys and patterns ---


def test_the_keys_of_both_forms_are_those_of_megatrons_models(megatron_rank):
    """The GPT model's keys, renamed, are the hybrid model's; its layers numbered."""
    for pattern, overrides in (("*-*-", {}), ("*E*E", EXPERTS)):
        numbered = {"singleton_local_shards": True}
        gpt = build(FREE, **overrides).sharded_state_dict(metadata=numbered).values()
        hybrid = build_hybrid(FREE, pattern, **overrides).sharded_state_dict(metadata=numbered)
        theirs = {value.key for value in hybrid.values()}
        assert {hybrid_key(value.key) for value in gpt} == theirs - {"output_layer._extra_state"}
        assert form_of(theirs) == "hybrid" and form_of(value.key for value in gpt) == "gpt"
        assert pattern_in(theirs) == pattern


def test_places_go_there_and_back():
    for layer in range(6):
        for part in ("self_attention.alpha_1", "mlp.linear_fc1.weight"):
            number = hybrid_layer(Place(layer, part))
            assert gpt_place(number, part) == Place(layer, part)
            assert gpt_place(number + 1, part) is None
    assert hybrid_layer(Place(0, "mixer.A_log")) is None


def test_patterns_of_gpt_models():
    for num_layers in (1, 3):
        for has_experts in (False, True):
            assert gpt_layers(pattern_of(num_layers, has_experts)) == (num_layers, has_experts)
    assert gpt_layers("*-|*-|*-*-") == (4, False)


@pytest.mark.parametrize("pattern", ["", "*", "-*", "**--", "*-*E", "M*-", "*-/*-", "*-G", "*-D-"])
def test_other_patterns_are_no_gpt_models(pattern):
    with pytest.raises(ValueError):
        gpt_layers(pattern)


# --- the check ---


@pytest.mark.parametrize("kv_shift", [None, FREE], ids=["vanilla", "taps"])
def test_a_hybrid_checkpoint_of_the_same_pattern_passes(megatron_rank, saved, kv_shift):
    saved(build_hybrid(kv_shift), "*-*-")
    check_checkpoint([build_hybrid(kv_shift)], kv_shift)


@pytest.mark.parametrize(
    ("built", "parts"),
    [
        ("*-*-*-", ["does not hold decoder.layers.4.", "--hybrid-layer-pattern"]),
        ("*-", ["layers that the model does not have", "decoder.layers.2, decoder.layers.3"]),
        ("*--*", ["does not hold decoder.layers.2.mlp"]),
    ],
)
def test_a_hybrid_checkpoint_of_another_pattern_is_refused(megatron_rank, saved, built, parts):
    saved(build_hybrid(FREE), built)
    refused(build_hybrid(FREE, built), FREE, *parts)


@pytest.mark.parametrize("kv_shift", [None, FREE], ids=["vanilla", "taps"])
def test_a_hybrid_checkpoint_is_refused_for_a_gpt_model(megatron_rank, saved, kv_shift):
    directory = saved(build_hybrid(kv_shift))
    refused(
        build(kv_shift),
        kv_shift,
        "is of a hybrid model with the layers *-*-",
        "this run builds a GPT model",
        "--hybrid-layer-pattern '*-*-'",
        f"kvshift-convert change-form {directory} TARGET --model-form gpt",
    )


def test_no_converter_is_named_for_what_it_cannot_convert(megatron_rank, saved):
    saved(build_hybrid(FREE, "*--*"))
    with pytest.raises(ValueError, match=r"layers \*--\*, and.*--hybrid-layer-pattern '\*--\*'$"):
        check_checkpoint([build(FREE)], FREE)


@pytest.mark.parametrize(("pattern", "overrides"), [("*-*-", {}), ("*-|*-", {}), ("*E*E", EXPERTS)])
@pytest.mark.parametrize("kv_shift", [None, FREE], ids=["vanilla", "taps"])
def test_translated_a_gpt_checkpoint_passes(megatron_rank, saved, pattern, overrides, kv_shift):
    saved(build(kv_shift, **overrides), pattern)
    check_checkpoint([build_hybrid(kv_shift, pattern.replace("|", ""), **overrides)], kv_shift)


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("*-*-*-", ["a GPT model with 2 layers", "*-*-*- is a hybrid model of 3", "'*-*-'"]),
        ("*-", ["a GPT model with 2 layers", "*- is a hybrid model of 1", "'*-*-'"]),
        ("*-*", ["cannot load it into this run's hybrid model", "2 attention", "'*-*-'"]),
    ],
)
def test_translated_a_gpt_checkpoint_with_other_layers_is_refused(
    megatron_rank, saved, pattern, parts
):
    saved(build(FREE), pattern)
    refused(build_hybrid(FREE, pattern), FREE, *parts)


@pytest.mark.parametrize(
    ("trained", "built", "parts"),
    [
        ({}, {"num_query_groups": 4}, ["layers.0.self_attention.alpha_1", "[2]", "[4]"]),
        ({"ffn_hidden_size": 64}, {}, ["layers.1.mlp.linear_fc1.weight", "[128, 32]", "[96, 32]"]),
        ({}, {"qk_layernorm": True}, ["does not hold decoder.layers.0.", "k_layernorm.weight"]),
    ],
)
def test_translated_a_gpt_checkpoint_with_other_sizes_is_refused(
    megatron_rank, saved, trained, built, parts
):
    saved(build(FREE, **trained), "*-*-")
    refused(build_hybrid(FREE, **built), FREE, *parts)


def test_translated_a_gpt_checkpoint_whose_layers_differ_is_refused(megatron_rank, saved):
    saved(build(FREE, **EXPERTS, moe_layer_freq=[0, 1]), "*E*E")
    refused(build_hybrid(FREE, "*E*E", **EXPERTS), FREE, "are not stacked", "--moe-layer-freq")


def test_translated_an_optimizer_state_by_buffers_is_refused(megatron_rank, saved):
    content = {"distrib_optim_sharding_type": "dp_reshardable"}
    saved(build(FREE), "*-*-", content)
    parts = ["the format dp_reshardable", "--dist-ckpt-optim-fully-reshardable", "--no-load-optim"]
    refused(build_hybrid(FREE), FREE, *parts)


def test_translated_without_its_optimizer_state_the_format_does_not_matter(megatron_rank, saved):
    content = {"distrib_optim_sharding_type": "dp_reshardable"}
    saved(build(FREE), "*-*-", content, no_load_optim=True)
    check_checkpoint([build_hybrid(FREE)], FREE)


def test_translated_identity_taps_start_from_a_vanilla_gpt_checkpoint(megatron_rank, saved):
    saved(build(None), "*-*-", finetune=True, no_load_optim=True)
    model = build_hybrid(IDENTITY)
    assert len(asked_for(model)) == 8
    check_checkpoint([model], IDENTITY)
    assert asked_for(model) == []


def test_translated_fine_tuning_does_not_leave_a_gpt_models_optimizer_state_out(
    megatron_rank, saved
):
    """Megatron loads it into a hybrid model even then."""
    saved(build(None), "*-*-", finetune=True)
    refused(build_hybrid(IDENTITY), IDENTITY, "optimizer state of the vanilla", "--no-load-optim")


def test_a_release_that_cannot_translate_names_the_converter(megatron_rank, saved, monkeypatch):
    from kvshift_megatron.checks import compare_forms

    monkeypatch.setattr(compare_forms, "_TRANSLATION", "megatron.core.no_such_module")
    directory = saved(build(FREE), "*-*-")
    converter = f"kvshift-convert change-form {directory} TARGET --model-form hybrid"
    refused(build_hybrid(FREE), FREE, "a GPT model", "a hybrid model", converter)


# --- what Megatron loads ---


@torch.no_grad()
def load_renamed(model, directory, swapped=False):
    """Load a GPT checkpoint as Megatron's load_checkpoint does."""
    from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
        gpt_compatible_layer_maps,
        retarget_sharded_state_dict_to_gpt_checkpoint,
    )

    maps = gpt_compatible_layer_maps("*-*-")
    if swapped:
        attention = dict(zip(maps.attention_to_gpt, reversed(maps.attention_to_gpt.values())))
        object.__setattr__(maps, "attention_to_gpt", attention)
    state = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    retarget_sharded_state_dict_to_gpt_checkpoint(state, maps)
    model.load_state_dict(dist_checkpointing.load({"model": state}, str(directory))["model"])


def same_weights(gpt, hybrid) -> bool:
    theirs = dict(gpt.named_parameters())
    return len(theirs) == len(dict(hybrid.named_parameters())) and all(
        torch.equal(parameter, theirs[gpt_name(name)])
        for name, parameter in hybrid.named_parameters()
    )


def gpt_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        parts[2] = str(int(parts[2]) // 2)
    return ".".join(parts).replace("final_norm", "final_layernorm")


def test_translated_weights_and_taps_are_the_same_to_the_bit(megatron_rank, saved):
    gpt = build(FREE)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter)
    directory = saved(gpt, "*-*-")
    hybrid = build_hybrid(FREE)
    assert not same_weights(gpt, hybrid)
    load_renamed(hybrid, directory)
    assert same_weights(gpt, hybrid)
    # An error that the comparison must see.
    load_renamed(hybrid, directory, swapped=True)
    assert not same_weights(gpt, hybrid)
