"""Megatron's TransformerLayer with this package's spec in fp32, against DenseLayer in float64."""

import re

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec
from tests.attention.dense_layer import DenseLayer
from tests.support.compare import assert_close_rel
from tests.support.single_process import gradients, randomize_taps, transformer_config

pytestmark = pytest.mark.usefixtures("megatron_rank")

HEADS, HEAD_SIZE, TOKENS, BATCH = 4, 8, 13, 2


def run_megatron(kv_shift, groups):
    """Return (output and gradients by name, x, weights, output gradient)."""
    config = transformer_config(
        num_layers=1, num_attention_heads=HEADS, num_query_groups=groups, kv_channels=HEAD_SIZE
    )
    if kv_shift is None:
        spec = vanilla_layer_spec(config)
    else:
        spec = kv_shift_layer_spec(config, kv_shift=kv_shift)
    layer = build_module(spec.layer_specs[0], config=config, layer_number=1)
    generator = torch.Generator().manual_seed(groups)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Larger than Megatron's 0.02, so that attention is far from uniform.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    randomize_taps(layer)
    x = torch.randn(TOKENS, BATCH, config.hidden_size, generator=generator, requires_grad=True)
    grad = torch.randn(TOKENS, BATCH, config.hidden_size, generator=generator)
    rotary = RotaryEmbedding(
        HEAD_SIZE, rotary_percent=1.0, rotary_base=100_000, use_cpu_initialization=True
    )
    output, _ = layer(x, attention_mask=None, rotary_pos_emb=rotary(TOKENS))
    output.backward(grad)
    results = {"output": output.detach(), "input": x.grad, **gradients(layer)}
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    return results, x.detach(), weights, grad


def run_dense(dense, x, weights, grad):
    x = x.double().requires_grad_()
    weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    output = dense(x, weights)
    output.backward(grad.double())
    return {
        "output": output.detach(),
        "input": x.grad,
        **{name: weight.grad for name, weight in weights.items()},
    }


def assert_same(actual, expected):
    """Compare each tensor at FP32_REL, and all taps of keys or of values as one [window, ng].

    With one query group a tap's gradient is a single sum of thousands of terms of both signs. If
    they happen to cancel, its own relative error means nothing.
    """
    assert actual.keys() == expected.keys()
    for kind in ("alpha", "beta"):
        names = [name for name in expected if f".{kind}_" in name]
        if names:
            stacks = [torch.stack([run[name] for name in names]) for run in (actual, expected)]
            assert_close_rel(f"{kind} taps", *stacks)
    for name, tensor in expected.items():
        if not re.search("alpha|beta", name):
            assert_close_rel(name, actual[name], tensor)


CASES = {
    "MHA": (4, KVShiftConfig()),
    "GQA": (2, KVShiftConfig()),
    "MQA": (1, KVShiftConfig()),
    "window 3": (2, KVShiftConfig(window=3)),
    "window 4": (4, KVShiftConfig(window=4)),
    "MQA, window 4": (1, KVShiftConfig(window=4)),
    "gate": (2, KVShiftConfig(variant="gate")),
    "gate, keys": (4, KVShiftConfig(variant="gate", shift_values=False)),
    "clamp": (4, KVShiftConfig(variant="clamp")),
    "clamp, window 3": (2, KVShiftConfig(variant="clamp", window=3, init="identity")),
    "keys": (2, KVShiftConfig(shift_values=False)),
    "values": (2, KVShiftConfig(shift_keys=False)),
    "values, window 3": (4, KVShiftConfig(shift_keys=False, window=3)),
    "vanilla": (2, None),
}


@pytest.mark.parametrize(("groups", "kv_shift"), CASES.values(), ids=CASES)
def test_output_and_every_gradient_agree(groups, kv_shift):
    actual, *inputs = run_megatron(kv_shift, groups)
    variant = "free" if kv_shift is None else kv_shift.variant
    dense = DenseLayer(HEADS, groups, HEAD_SIZE, variant=variant)
    assert_same(actual, run_dense(dense, *inputs))
    taps = 0 if kv_shift is None else kv_shift.parameters_per_group
    assert len([name for name in actual if re.search("alpha|beta", name)]) == taps


def _swap(kind):
    def swap(weights):
        first, second = f"self_attention.{kind}_1", f"self_attention.{kind}_2"
        return {**weights, first: weights[second], second: weights[first]}

    return swap


def _of_the_other_group(weights):
    return {
        name: weight.flip(0) if re.search("alpha|beta", name) else weight
        for name, weight in weights.items()
    }


def _alpha_for_beta(weights):
    other = {"alpha": "beta", "beta": "alpha"}
    return {
        name: weights[re.sub("alpha|beta", lambda found: other[found[0]], name)] for name in weights
    }


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ({"lag": 2}, None),
        ({"rotate_first": True}, None),
        ({"rope_base": 10_000.0}, None),
        ({"variant": "clamp"}, None),
        ({}, _swap("alpha")),
        ({}, _swap("beta")),
        ({}, _of_the_other_group),
        ({}, _alpha_for_beta),
    ],
    ids=[
        "shifted by two",
        "rotated before the shift",
        "another RoPE base",
        "clamped",
        "alpha swapped",
        "beta swapped",
        "taps of the other group",
        "alpha for beta",
    ],
)
def test_a_planted_error_is_caught(rule, change):
    actual, x, weights, grad = run_megatron(KVShiftConfig(), groups=2)
    assert_same(actual, run_dense(DenseLayer(HEADS, 2, HEAD_SIZE), x, weights, grad))
    if change is not None:
        weights = change(weights)
    expected = run_dense(DenseLayer(HEADS, 2, HEAD_SIZE, **rule), x, weights, grad)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(actual, expected)
