"""Layer patterns of hybrid models: which attention of the model a layer is."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention.spec_check import LayerSpec
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from kvshift_megatron.specs import hybrid_pattern
from kvshift_megatron.specs.hybrid_pattern import attention_numbers, num_layers
from kvshift_megatron.specs.replace_attention import with_kv_shift
from kvshift_megatron.specs.te_free.hybrid_stack import local_hybrid_stack
from tests.support.single_process import gpt_model, transformer_config


@pytest.mark.parametrize(
    ("pattern", "layers", "numbers"),
    [
        ("*-*-", 4, {1: 1, 3: 2}),
        ("M*-|*E/*-/*-", 5, {2: 1, 4: 2}),
        ("--", 2, {}),
        (None, 0, {}),
    ],
)
def test_layers_and_attention_layers_are_counted(pattern, layers, numbers):
    assert attention_numbers(pattern) == numbers
    assert num_layers(pattern) == layers


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_a_static_spec_takes_the_pattern_of_megatrons_arguments(name, monkeypatch):
    args = SimpleNamespace(**{name: "-*"})
    monkeypatch.setattr(hybrid_pattern, "megatron_args", lambda: args)
    assert hybrid_pattern.attention_numbers_of_the_run() == {2: 1}
    monkeypatch.setattr(hybrid_pattern, "megatron_args", lambda: None)
    assert hybrid_pattern.attention_numbers_of_the_run() == {}


@pytest.mark.parametrize("as_function", [False, True])
def test_an_attention_starts_with_the_taps_of_the_gpt_layer_with_its_number(
    as_function, megatron_rank
):
    config, kv_shift = transformer_config(), KVShiftConfig(seed=3)
    numbers = attention_numbers("-*-*")
    static = LayerSpec(attention_numbers=(lambda: numbers) if as_function else numbers)
    stack = with_kv_shift(local_hybrid_stack(config), kv_shift, static)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    gpt = gpt_model(config, kv_shift_layer_spec(config, kv_shift=kv_shift)).decoder.layers
    for layer_number, number in numbers.items():
        layer = build_module(
            stack.submodules.attention_layer,
            config=config,
            layer_number=layer_number,
            pg_collection=groups,
        )
        ours, theirs = (
            dict(module.self_attention.named_parameters()) for module in (layer, gpt[number - 1])
        )
        taps = [name for name in theirs if name.startswith(("alpha", "beta"))]
        assert len(taps) == 4
        assert all(torch.equal(ours[name], theirs[name]) for name in taps)
