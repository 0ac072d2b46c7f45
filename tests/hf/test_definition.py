"""The model agrees with the definition: values, gradients, every variant and option."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.hf.attention_kvshift import KVShiftLlamaAttention
from kvshift_megatron.hf.configuration_kvshift import VARIANTS as VARIANT_NAMES
from kvshift_megatron.hf.plan_kvshift import ShiftPlan
from kvshift_megatron.taps import taps_from_parameters
from tests.hf.agreement import FLOAT64
from tests.hf.models import (
    VARIANTS,
    agrees,
    defined_attention,
    defined_logits,
    full_logits,
    model_parameters,
    named,
    randomize,
    tiny_config,
    tiny_model,
    tokens,
)

OPTIONS = [
    {"qk_norm": True},
    {"qkv_bias": True, "kv_shift_window": 3},
    {"attention_bias": True},
    {"tie_word_embeddings": True},
    {"num_local_experts": 4, "num_experts_per_tok": 2},
    {"head_dim": 12, "num_key_value_heads": 1},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
]


@pytest.mark.parametrize("options", VARIANTS + OPTIONS, ids=named)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_agree_with_the_definition(options, attention):
    model = tiny_model(**options, attn_implementation=attention)
    ids = tokens(2, 7)
    logits = full_logits(model, ids)
    expected = torch.stack(
        [defined_logits(model.config, model_parameters(model), row) for row in ids]
    )
    assert agrees(logits, expected.detach())


@pytest.mark.parametrize("which", ["alpha", "beta"])
def test_swapped_taps_are_noticed(which):
    model = tiny_model()
    ids = tokens(1, 6)
    expected = defined_logits(model.config, model_parameters(model), ids[0]).detach()
    attention = model.model.layers[1].self_attn
    first, second = getattr(attention, f"{which}_1"), getattr(attention, f"{which}_2")
    first.data, second.data = second.data, first.data
    assert not agrees(full_logits(model, ids)[0], expected, 1e-2)


def random_attention(config, seed=0):
    torch.manual_seed(seed)
    attention = KVShiftLlamaAttention(config, 0).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    randomize(attention, seed)
    return attention


def run_attention(attention, hidden):
    size, length = attention.head_dim, hidden.shape[1]
    base = attention.config.rope_parameters["rope_theta"]
    angle = torch.arange(length)[:, None] * base ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.cat([angle, angle], -1)[None]
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    return attention(hidden, (angle.cos(), angle.sin()), mask[None, None], ShiftPlan())[0]


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_gradients_are_those_of_the_definition(options):
    config = tiny_config(**options, attn_implementation="eager")
    attention = random_attention(config)
    hidden = torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 32, dtype=torch.float64)
    leaves = {"hidden": hidden, **dict(attention.named_parameters())}
    ours = run_attention(attention, hidden)[0]
    reference = defined_attention(config, dict(attention.named_parameters()), "", hidden[0])
    # The softmax of eager is in fp32 for every dtype.
    assert agrees(ours, reference, 1e-6)
    got = torch.autograd.grad((ours * weight).sum(), leaves.values())
    expected = torch.autograd.grad((reference * weight).sum(), leaves.values())
    outside = config.kv_shift_variant != "clamp"
    for name, a, b in zip(leaves, got, expected):
        if config.kv_shift_variant == "clamp" and ("alpha" in name or "beta" in name):
            outside |= bool(((leaves[name] < 0) | (leaves[name] > 1)).any())
        assert a.abs().max() > 0, name
        assert agrees(a, b, 1e-5), name
    assert outside, "a test of the clamp needs taps outside it"


def test_a_tap_at_the_edge_of_the_clamp_or_outside_it_keeps_its_gradient():
    attention = random_attention(tiny_config(kv_shift_variant="clamp", attn_implementation="eager"))
    for first, second in ((1.0, 0.0), (1.01, -0.01), (-9.0, 9.0)):
        with torch.no_grad():
            attention.beta_1.fill_(first)
            attention.beta_2.fill_(second)
        attention.zero_grad()
        run_attention(attention, torch.randn(1, 5, 32).double()).pow(2).sum().backward()
        assert attention.beta_1.grad.abs().min() > 0 and attention.beta_2.grad.abs().min() > 0


@pytest.mark.parametrize("logit", [-100.0, -12.0, -3.0, 0.5, 12.0, 100.0])
def test_the_taps_are_those_of_megatrons_layer_and_learn_alike(logit):
    """Two files say the formulas, which must not drift apart: values and derivatives to the bit."""
    for variant in VARIANT_NAMES:
        config = tiny_config(kv_shift_variant=variant, attn_implementation="eager")
        attention = random_attention(config).float()
        with torch.no_grad():
            for name in attention.tap_names["key"]:
                getattr(attention, name).add_(logit)
        parameters = [getattr(attention, name) for name in attention.tap_names["key"]]
        ours = attention.taps("key", torch.float32)
        weight = torch.randn(ours.shape)
        shift = KVShiftConfig(variant=variant, window=config.kv_shift_window)
        megatrons = taps_from_parameters(shift, torch.stack(parameters))
        assert torch.equal(ours, megatrons)
        grads = [
            torch.autograd.grad((taps * weight).sum(), parameters) for taps in (ours, megatrons)
        ]
        assert all(map(torch.equal, *grads)) and all(grad.all() for grad in grads[0])


@given(
    groups=st.sampled_from([1, 2, 3]),
    per_group=st.sampled_from([1, 2]),
    size=st.sampled_from([2, 4, 8]),
    window=st.sampled_from([2, 3, 4]),
    length=st.integers(1, 6),
    tied=st.booleans(),
    shifted=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape_agrees_with_the_definition(
    groups, per_group, size, window, length, tied, shifted, seed
):
    heads = groups * per_group
    model = tiny_model(
        seed,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        hidden_size=heads * 4,
        head_dim=size,
        kv_shift_window=window,
        kv_shift_keys=shifted[0],
        kv_shift_values=shifted[1],
        tie_word_embeddings=tied,
    )
    ids = tokens(1, length, seed)
    expected = defined_logits(model.config, model_parameters(model), ids[0])
    assert agrees(full_logits(model, ids)[0], expected.detach())


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_initial_taps_are_the_papers(options):
    torch.manual_seed(3)
    config = tiny_config(**options, num_attention_heads=32, num_key_value_heads=32, head_dim=2)
    attention = KVShiftLlamaAttention(config, 0)
    attention.draw_taps()
    drawn = {}
    for kind in config.tap_names():
        taps = attention.taps(kind, torch.float32).detach()
        assert torch.allclose(taps.sum(0), torch.ones(32), atol=1e-6)
        if config.kv_shift_variant == "clamp" and config.kv_shift_window > 2:
            assert torch.equal(taps, torch.eye(3)[:, :1].expand(3, 32))
            continue
        first = taps[:-1]
        assert first.min() >= 0 and first.max() <= 1 and first.std() > 0.2
        drawn[kind] = first
    if len(drawn) == 2:
        assert not torch.allclose(drawn["key"], drawn["value"])


def test_bf16_shifts_in_fp32():
    config = tiny_config(kv_shift_window=4)
    attention = random_attention(config).to(torch.bfloat16)
    states = torch.randn(2, 2, 9, 8, dtype=torch.bfloat16)
    shifted = attention.shift("key", states, ShiftPlan())
    taps = [getattr(attention, f"alpha_{j}").double()[:, None, None] for j in (1, 2, 3, 4)]
    expected = sum(tap * states[:, :, 3 - j : 9 - j].double() for j, tap in enumerate(taps))
    assert shifted.dtype == torch.bfloat16
    # The result is rounded once, at the end.
    assert (shifted.double() - expected).abs().max() <= expected.abs().max() * 2**-8
    wide = attention.double().shift("key", states.double(), ShiftPlan())
    assert agrees(wide, expected, FLOAT64)
