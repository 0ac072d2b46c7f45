"""The report of each layer's attention, and the refusal of a model that was not asked for."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.checks.model import (
    LayerAttention,
    ModelCheck,
    _ranges,
    assert_kv_shift,
    describe,
    gather_layers,
    local_layers,
    report_after_build,
)
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec, with_kv_shift
from tests.support.single_process import gpt_model, transformer_config

FREE, GATE = KVShiftConfig(), KVShiftConfig(variant="gate")


def build(kv_shift, **fields):
    config = transformer_config(**fields)
    if kv_shift is None:
        return gpt_model(config, vanilla_layer_spec(config))
    return gpt_model(config, kv_shift_layer_spec(config, kv_shift=kv_shift))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([1], "layer 1"),
        ([1, 2], "layers 1-2"),
        ([1, 2, 3, 7], "layers 1-3, 7"),
        ([2, 4, 6], "layers 2, 4, 6"),
        ([1, 3, 4, 8, 9, 10], "layers 1, 3-4, 8-10"),
    ],
)
def test_ranges(numbers, text):
    assert _ranges(numbers) == text


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], "attention: none; 0 taps"),
        (
            [(n, "KVShiftSelfAttention", FREE, 64) for n in range(1, 29)],
            "attention: KV shifting (free, window 2, keys and values) in layers 1-28; 1792 taps",
        ),
        (
            [(1, "SelfAttention", None, 0), (2, "SelfAttention", None, 0)],
            "attention: vanilla (SelfAttention) in layers 1-2; 0 taps",
        ),
        (
            [
                (1, "KVShiftSelfAttention", FREE, 8),
                (1, "KVShiftSelfAttention", FREE, 8, True),
                (2, "SelfAttention", None, 0, True),
            ],
            "attention: KV shifting (free, window 2, keys and values) in layer 1; "
            "KV shifting (free, window 2, keys and values) in MTP layer 1; "
            "vanilla (SelfAttention) in MTP layer 2; 16 taps",
        ),
        (
            [
                (1, "SelfAttention", None, 0),
                (2, "KVShiftSelfAttention", FREE, 8),
                (3, "KVShiftSelfAttention", GATE, 4),
                (4, "SelfAttention", None, 0),
            ],
            "attention: vanilla (SelfAttention) in layers 1, 4; "
            "KV shifting (free, window 2, keys and values) in layer 2; "
            "KV shifting (gate, window 2, keys and values) in layer 3; 12 taps",
        ),
    ],
)
def test_description(layers, text):
    assert describe([LayerAttention(*layer) for layer in layers]) == text


@pytest.mark.parametrize(
    ("kv_shift", "taps"), [(FREE, 8), (GATE, 4), (KVShiftConfig(window=4, shift_keys=False), 8)]
)
def test_layers_of_a_model(megatron_rank, kv_shift, taps):
    model = build(kv_shift, num_layers=3)
    expected = [LayerAttention(n, "KVShiftSelfAttention", kv_shift, taps) for n in (1, 2, 3)]
    assert local_layers([model]) == gather_layers([model]) == expected
    counted = sum(p.numel() for n, p in model.named_parameters() if ".alpha_" in n or ".beta_" in n)
    assert counted == 3 * taps


def test_layers_of_a_vanilla_model(megatron_rank):
    model = build(None)
    assert local_layers([model]) == [(n, "SelfAttention", None, 0, False, "") for n in (1, 2)]


def test_layers_of_a_mixed_model_come_by_number(megatron_rank):
    config = transformer_config(num_layers=4)
    spec = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    spec.layer_specs[2] = with_kv_shift(spec.layer_specs[2], FREE)
    model = gpt_model(config, spec)
    shifting = [layer[2] for layer in local_layers([model])]
    assert shifting == [None, None, FREE, None]
    # Chunks of virtual pipeline stages may come in any order.
    holder = SimpleNamespace(pg_collection=model.pg_collection)
    chunks = [torch.nn.ModuleList(model.decoder.layers[i:j]) for i, j in ((2, 4), (0, 2))]
    chunks[0].pg_collection = holder.pg_collection
    assert [layer[0] for layer in gather_layers(chunks)] == [1, 2, 3, 4]


def test_the_right_model_passes_and_is_reported_once(megatron_rank, capsys):
    for kv_shift, line in (
        (
            FREE,
            "kvshift_megatron: attention: KV shifting (free, window 2, keys and values) "
            "in layers 1-2; 16 taps\n",
        ),
        (None, "kvshift_megatron: attention: vanilla (SelfAttention) in layers 1-2; 0 taps\n"),
    ):
        model = [build(kv_shift)]
        capsys.readouterr()
        assert ModelCheck(kv_shift)(model) is model
        assert capsys.readouterr().out == line


def test_a_vanilla_model_instead_of_a_shifting_one_is_refused(megatron_rank):
    with pytest.raises(ValueError, match=r"vanilla \(SelfAttention\) in layers 1-2.*--spec"):
        ModelCheck(FREE)([build(None)])


def test_a_shifting_model_instead_of_the_baseline_is_refused(megatron_rank):
    with pytest.raises(ValueError, match=r"baseline model.*KV shifting \(free.*layers 1-2"):
        ModelCheck(None)([build(FREE)])


def test_one_hook_is_added_whatever_the_number_of_stages(megatron_rank):
    def theirs(model):
        return model

    config = SimpleNamespace(post_wrap_hooks=[theirs])
    for _ in range(3):
        report_after_build(config, GATE)
    first, second = config.post_wrap_hooks
    assert first is theirs
    assert isinstance(second, ModelCheck) and second.kv_shift is GATE


def test_a_configuration_without_hooks_is_not_changed():
    report_after_build(transformer_config(), FREE)
    config = SimpleNamespace(post_wrap_hooks=None)
    report_after_build(config, FREE)
    assert config.post_wrap_hooks is None


def test_the_spec_callable_hooks_megatrons_model_configuration(megatron_rank):
    from megatron.training.models.gpt import GPTModelConfig

    config = GPTModelConfig(transformer=transformer_config(), vocab_size=64)
    kv_shift_layer_spec(config, kv_shift=FREE)
    kv_shift_layer_spec(config, kv_shift=FREE)
    (hook,) = config.post_wrap_hooks
    with pytest.raises(ValueError, match="was asked for"):
        hook([build(None)])
    vanilla_layer_spec(other := GPTModelConfig(transformer=transformer_config(), vocab_size=64))
    assert not other.post_wrap_hooks


def test_assert_kv_shift_says_what_it_found(megatron_rank):
    model = build(GATE)
    line = "attention: KV shifting (gate, window 2, keys and values) in layers 1-2; 8 taps"
    assert assert_kv_shift(model) == assert_kv_shift([model], GATE) == line


def test_assert_kv_shift_fails_for_one_vanilla_layer_and_for_other_taps(megatron_rank):
    with pytest.raises(ValueError, match=r"gate, window 2.* was asked for.*free, window 2"):
        assert_kv_shift(build(FREE), GATE)
    config = transformer_config(num_layers=3)
    spec = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    spec.layer_specs[1] = with_kv_shift(spec.layer_specs[1], FREE)
    with pytest.raises(ValueError, match=r"vanilla \(SelfAttention\) in layers 1, 3"):
        assert_kv_shift(gpt_model(config, spec))
    with pytest.raises(ValueError, match="attention: none"):
        layerless = torch.nn.Module()
        layerless.pg_collection = gpt_model(config, spec).pg_collection
        assert_kv_shift(layerless)


def test_assert_kv_shift_is_importable_from_the_package():
    import kvshift_megatron

    assert kvshift_megatron.assert_kv_shift is assert_kv_shift
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvshift_megatron.no_such_name
