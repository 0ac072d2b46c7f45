"""The comparisons with stock Megatron catch planted differences."""

import pytest
import torch

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from tests.support.fake_ranks import Layout, fake_rank
from tests.transformer_engine.against_stock import differences, tap_problems
from tests.transformer_engine.models import gpt_model, transformer_config
from tests.transformer_engine.test_gpt import stock_spec

_LAYOUT = Layout(tp=8)


@pytest.fixture(params=["meta", "cpu"])
def models(request):
    """Build (ours, stock), with nothing planted yet."""
    with fake_rank(_LAYOUT, 7):
        config = transformer_config(_LAYOUT, request.param)
        ours = gpt_model(config, kv_shift_layer_spec(config), device=request.param)
        stock = gpt_model(config, stock_spec(config), device=request.param)
        assert differences(ours, stock) == []
        assert tap_problems(ours, _LAYOUT.tp) == []
        yield ours, stock


def last_attention(model) -> KVShiftSelfAttention:
    return model.decoder.layers[-1].self_attention


def test_a_vanilla_layer(models):
    ours, stock = models
    ours.decoder.layers[-1].self_attention = last_attention(stock)
    assert differences(ours, stock) == ["3 of 4 attentions shift"]


def test_a_renamed_module(models):
    ours, stock = models
    attention = last_attention(ours)
    attention.projection = attention.linear_proj
    del attention.linear_proj
    found = differences(ours, stock)
    path = "decoder.layers.3.self_attention"
    for what, name in [
        ("module", "linear_proj"),
        ("parameter", "linear_proj.weight"),
        ("state-dict key", "linear_proj.weight"),
        ("state-dict key", "linear_proj._extra_state"),
        ("sharded_state_dict entry", "linear_proj.weight"),
    ]:
        assert f"{what} {path}.{name} is stock Megatron's only" in found


def test_a_module_of_another_class(models):
    ours, stock = models
    linear = last_attention(ours).linear_proj
    linear.__class__ = type("AnotherLinear", (type(linear),), {})
    (found,) = differences(ours, stock)
    assert "linear_proj" in found and "AnotherLinear" in found


@pytest.mark.parametrize("tag", ["sequence_parallel", "allreduce", "partition_stride"])
def test_a_wrong_tag_of_a_weight(models, tag):
    ours, stock = models
    weight = last_attention(ours).linear_qkv.weight
    setattr(weight, tag, "planted")
    (found,) = differences(ours, stock)
    assert found.startswith("parameter decoder.layers.3.self_attention.linear_qkv.weight")


def test_another_dtype_of_a_weight(models):
    ours, stock = models
    linear = last_attention(ours).linear_proj
    linear.weight = torch.nn.Parameter(linear.weight.float())
    assert any("torch.float32" in line for line in differences(ours, stock))


def test_a_tap_tagged_for_sequence_parallelism(models):
    ours, _ = models
    last_attention(ours).alpha_1.sequence_parallel = True
    (found,) = tap_problems(ours, _LAYOUT.tp)
    assert found.startswith("decoder.layers.3.self_attention.alpha_1 is")


def test_a_tap_without_its_tensor_parallel_tag(models):
    ours, _ = models
    del last_attention(ours).beta_2.tensor_model_parallel
    assert len(tap_problems(ours, _LAYOUT.tp)) == 1


def test_a_tap_of_another_shape(models):
    ours, _ = models
    attention = last_attention(ours)
    attention.alpha_2 = torch.nn.Parameter(torch.empty(8, device=attention.alpha_1.device))
    assert len(tap_problems(ours, _LAYOUT.tp)) == 1


def test_a_missing_tap(models):
    ours, _ = models
    del last_attention(ours).alpha_1
    (found,) = tap_problems(ours, _LAYOUT.tp)
    assert "has ['alpha_2', 'beta_1', 'beta_2']" in found
