"""The name map agrees with the models' own parameters and with definitions written out here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.convert.layouts import LAYOUTS
from kvshift_megatron.convert.megatron_model import build_model, by_parameter
from kvshift_megatron.convert.name_map import expand, rows
from kvshift_megatron.convert.transforms import Convolution, PackedQKV, SeparateQKV
from tests.convert import models

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TAPS = st.one_of(
    st.just(models.FREE),
    st.builds(KVShiftConfig, window=st.integers(2, 4), shift_values=st.booleans()),
    st.just(KVShiftConfig(variant="gate", shift_keys=False)),
    st.just(KVShiftConfig(variant="clamp")),
)


@st.composite
def architectures(draw, taps=TAPS):
    groups = draw(st.sampled_from([1, 2, 3]))
    biased = draw(st.booleans())
    experts = draw(st.sampled_from([0, 0, 3])) if not biased else 0
    vocab = draw(st.integers(1, 40))
    return models.architecture(
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        kv_channels=2 * draw(st.integers(1, 4)),
        hidden_size=draw(st.integers(1, 24)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        vocab_size=vocab,
        padded_vocab_size=vocab + draw(st.integers(0, 9)),
        num_layers=draw(st.integers(1, 3)),
        tied=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        add_bias_linear=biased,
        add_qkv_bias=draw(st.booleans()),
        num_experts=experts,
        kv_shift=draw(taps),
    )


def random_row(row, arch, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(name.shape(arch), generator=generator).to(dtype) for name in row.megatron
    )


@settings(max_examples=50, deadline=None)
@given(arch=architectures(), dtype=DTYPES, layout=st.sampled_from(["kvshift", "mixtral", "llama"]))
def test_every_row_round_trips_bitwise(arch, dtype, layout):
    names = []
    for row in expand(layout, arch):
        tensors = random_row(row, arch, dtype)
        hf = row.transform.to_hf(tensors, arch)
        assert len(hf) == len(row.hf)
        names += row.hf
        back = row.transform.to_megatron(hf, arch)
        for name, before, after in zip(row.megatron, tensors, back, strict=True):
            if "vocab" in name.axes:
                assert (after[arch.vocab_size :] == 0).all()
                before, after = before[: arch.vocab_size], after[: arch.vocab_size]
            assert torch.equal(before, after) and before.dtype == after.dtype
    assert len(names) == len(set(names))


@settings(max_examples=50, deadline=None)
@given(arch=architectures(taps=st.just(models.FREE)), dtype=DTYPES)
def test_baichuan_rows_round_trip_bitwise(arch, dtype):
    for row in expand("baichuan_m1", arch):
        if arch.has_qkv_bias or arch.num_experts or "embed" in row.hf[0] or "lm_head" in row.hf[0]:
            continue
        tensors = random_row(row, arch, dtype)
        back = row.transform.to_megatron(row.transform.to_hf(tensors, arch), arch)
        assert all(map(torch.equal, tensors, back))


@settings(max_examples=50, deadline=None)
@given(arch=architectures())
def test_queries_keys_and_values_are_the_right_rows_of_megatrons(arch):
    """Check by index: group g of the fused tensor is its query heads, its key, its value."""
    heads, groups, size = arch.num_attention_heads, arch.num_query_groups, arch.kv_channels
    per_group = heads // groups
    fused = torch.arange(arch.size("qkv"))[:, None]
    q, k, v = SeparateQKV().to_hf((fused,), arch)
    start = {g: g * (per_group + 2) * size for g in range(groups)}
    for head in range(heads):
        first = start[head // per_group] + (head % per_group) * size
        assert q[head * size : (head + 1) * size, 0].tolist() == list(range(first, first + size))
    for offset, tensor in ((per_group, k), (per_group + 1, v)):
        for g in range(groups):
            first = start[g] + offset * size
            rows_of_g = tensor[g * size : (g + 1) * size, 0].tolist()
            assert rows_of_g == list(range(first, first + size))
    assert torch.equal(PackedQKV().to_hf((fused,), arch)[0], torch.cat((q, k, v)))


def test_baichuans_convolution_has_the_previous_token_first():
    arch = models.architecture(num_query_groups=2)
    current, previous = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, -4.0])
    (conv,) = Convolution().to_hf((current, previous), arch)
    assert conv.shape == (1, 1, 2, 1, 2)
    assert conv[0, 0, :, 0, 0].tolist() == previous.tolist()
    assert conv[0, 0, :, 0, 1].tolist() == current.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "qk_layernorm": True},
        {"add_bias_linear": True, "kv_shift": None},
        {"add_qkv_bias": True, "kv_shift": KVShiftConfig(variant="gate", shift_values=False)},
        {"num_experts": 3, "kv_shift": KVShiftConfig(window=4)},
    ],
)
def test_it_names_every_parameter_of_both_models(changes, megatron_rank):
    from kvshift_megatron.convert.to_hf_config import config_from_architecture
    from kvshift_megatron.hf import KVShiftLlamaConfig, KVShiftLlamaForCausalLM

    arch = models.architecture(**changes)
    named = {}
    for row in expand("kvshift", arch):
        for name, tensor in zip(row.megatron, random_row(row, arch)):
            named.update(by_parameter(name.local, tensor))
    found = dict(build_model(arch).named_parameters())
    assert {n: p.shape for n, p in found.items()} == {n: t.shape for n, t in named.items()}
    if arch.kv_shift is None:
        return
    fields = config_from_architecture("kvshift", arch)
    fields.pop("model_type")
    model = KVShiftLlamaForCausalLM(KVShiftLlamaConfig(**fields))
    wanted = {n: p.shape for n, p in model.named_parameters()}
    made = {}
    for row in expand("kvshift", arch):
        hf = row.transform.to_hf(random_row(row, arch), arch)
        made.update(zip(row.hf, (tensor.shape for tensor in hf)))
    assert made == wanted


def test_every_layout_is_known_and_no_other():
    arch = models.architecture()
    for layout in LAYOUTS:
        assert rows(layout, arch)
    with pytest.raises(ValueError, match="layout='gpt2' is unknown: choose one of kvshift"):
        rows("gpt2", arch)


def test_the_first_layers_te_and_te_free_names():
    """Check names in megatron-core's specs; a test above compares TE-free ones with a model."""
    names = {row.hf[0]: row.megatron[0] for row in expand("kvshift", models.architecture())}
    norm = names["model.layers.0.input_layernorm.weight"]
    assert norm.te == "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert norm.local == "decoder.layers.0.input_layernorm.weight"
    experts = {
        row.hf[0]: row.megatron[0] for row in expand("kvshift", models.architecture(num_experts=2))
    }
    fc1 = experts["model.layers.1.mlp.experts.gate_up_proj"]
    assert fc1.te == "decoder.layers.1.mlp.experts.linear_fc1.weight{expert}"
    assert experts["model.layers.1.post_attention_layernorm.weight"].te == (
        "decoder.layers.1.pre_mlp_layernorm.weight"
    )
