"""SDPACoreAttention against Megatron's DotProductAttention and against float64."""

import math

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from kvshift_megatron.specs.te_free import SDPACoreAttention
from tests.support.compare import assert_close_rel
from tests.support.single_process import seed_everything, transformer_config

pytestmark = pytest.mark.usefixtures("megatron_rank")

HEADS, HEAD_SIZE = 4, 8


def build(cls, mask_type=AttnMaskType.causal, layer_number=3, groups=2, scale=None, **fields):
    config = transformer_config(num_query_groups=groups, num_layers=4, **fields)
    return cls(
        config=config,
        layer_number=layer_number,
        attn_mask_type=mask_type,
        attention_type="self",
        softmax_scale=scale,
    )


def draw(groups=2, sq=9, sk=9, batch=2, seed=0):
    """Draw query, key and value; key and value strided, as after Megatron's split of mixed_qkv."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(sq, batch, HEADS, HEAD_SIZE, generator=generator)
    key, value = torch.randn(sk, batch, groups, 2 * HEAD_SIZE, generator=generator).chunk(2, dim=3)
    return [x.detach().requires_grad_() for x in (query, key, value)]


def run(core, tensors, mask=None, **kwargs):
    """Return (output, gradients of query, key and value) for a fixed output gradient."""
    output = core(*tensors, mask, **kwargs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return output, torch.autograd.grad(output, tensors, grad)


def dense(query, key, value, allowed, scale=None):
    """Return softmax(Q K^T scale + mask) V of [s, b, n, hn] as [sq, b, np * hn]."""
    repeats = query.size(2) // key.size(2)
    key = key.repeat_interleave(repeats, dim=2)
    value = value.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("ibnh,jbnh->bnij", query, key)
    scores = scores * (query.size(3) ** -0.5 if scale is None else scale)
    probabilities = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.einsum("bnij,jbnh->ibnh", probabilities, value).flatten(2)


def run_dense(tensors, allowed, scale=None):
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    return run(lambda q, k, v, _: dense(q, k, v, allowed, scale), doubles)


def assert_same(actual, expected):
    assert_close_rel("output", actual[0], expected[0])
    for name, a, b in zip(("query", "key", "value"), actual[1], expected[1], strict=True):
        assert_close_rel(f"gradient of {name}", a, b)


def causal(sq, sk=None):
    sk = sq if sk is None else sk
    return torch.arange(sk)[None, :] <= torch.arange(sq)[:, None] + sk - sq


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scale": 0.7},
        {"apply_query_key_layer_scaling": True},
        {"apply_query_key_layer_scaling": True, "scale": 0.7},
        {"kv_channels": 8, "layer_number": 1},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_causal_equals_megatrons_and_the_formula(groups, fields):
    tensors = draw(groups)
    actual = run(build(SDPACoreAttention, groups=groups, **fields), tensors)
    assert_same(actual, run(build(DotProductAttention, groups=groups, **fields), tensors))
    assert_same(actual, run_dense(tensors, causal(9), fields.get("scale")))


@pytest.mark.parametrize(
    ("wrong", "scale"),
    [(torch.ones(9, 9, dtype=torch.bool), None), (causal(9).T, None), (causal(9), 0.36)],
    ids=["unmasked", "anti-causal", "scale"],
)
def test_the_comparator_catches_a_planted_error(wrong, scale):
    tensors = draw()
    actual = run(build(SDPACoreAttention), tensors)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(actual, run_dense(tensors, wrong, scale))


@pytest.mark.parametrize("window", [(3, 0), (1, 0), (20, 0)])
@pytest.mark.parametrize("skip_freq", [None, 2, [0, 1, 1, 0]])
def test_sliding_window_equals_megatrons_and_the_formula(window, skip_freq):
    fields = {"window_size": window, "window_attn_skip_freq": skip_freq}
    tensors = draw()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    for layer_number in (1, 2, 3):
        slides = skip_freq is None or (
            layer_number % skip_freq != 0
            if isinstance(skip_freq, int)
            else bool(skip_freq[layer_number - 1])
        )
        allowed = (distance >= 0) & ((distance <= window[0]) | (not slides))
        actual = run(build(SDPACoreAttention, layer_number=layer_number, **fields), tensors)
        expected = run(build(DotProductAttention, layer_number=layer_number, **fields), tensors)
        assert_same(actual, expected)
        assert_same(actual, run_dense(tensors, allowed))


def test_one_visible_key_gives_its_value():
    query, key, value = draw(groups=HEADS)
    output = build(SDPACoreAttention, groups=HEADS, window_size=(0, 0))(query, key, value, None)
    assert_close_rel("output", output, value.flatten(2))


def test_an_unbounded_left_window_is_causal():
    tensors = draw()
    actual = run(build(SDPACoreAttention, window_size=(-1, 0)), tensors)
    assert_same(actual, run_dense(tensors, causal(9)))


@pytest.mark.parametrize("right", [0, 3, -1])
@pytest.mark.parametrize("sq", [9, 4])
def test_a_window_open_to_the_right_stays_causal(sq, right):
    """Megatron's own attention would let a causal query see `right` later tokens."""
    tensors = draw(sq=sq)
    distance = torch.arange(sq)[:, None] + 9 - sq - torch.arange(9)
    actual = run(build(SDPACoreAttention, window_size=(2, right)), tensors)
    assert_same(actual, run_dense(tensors, (distance >= 0) & (distance <= 2)))


def test_the_window_closes_an_open_mask_on_both_sides():
    tensors = draw()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    core = build(SDPACoreAttention, AttnMaskType.no_mask, window_size=(2, 1))
    assert_same(run(core, tensors), run_dense(tensors, (distance <= 2) & (distance >= -1)))


@pytest.mark.parametrize(("sq", "sk"), [(3, 9), (1, 9), (9, 9)])
def test_causal_aligns_the_last_query_with_the_last_key(sq, sk):
    tensors = draw(sq=sq, sk=sk)
    assert_same(run(build(SDPACoreAttention), tensors), run_dense(tensors, causal(sq, sk)))


@pytest.mark.parametrize("mask_type", [AttnMaskType.arbitrary, AttnMaskType.padding])
def test_a_mask_tensor_is_honoured(mask_type):
    tensors = draw()
    blocked = torch.rand(2, 1, 9, 9) < 0.5
    blocked[..., 0] = False  # every query sees something
    actual = run(build(SDPACoreAttention, mask_type), tensors, blocked)
    assert_same(actual, run_dense(tensors, ~blocked))
    assert_same(actual, run(build(DotProductAttention, mask_type), tensors, blocked))
    # The type of the call overrides the one of the construction.
    overridden = run(build(SDPACoreAttention), tensors, blocked, attn_mask_type=mask_type)
    assert_same(overridden, actual)


def test_without_a_mask_a_query_sees_every_key():
    tensors = draw()
    everything = torch.ones(9, 9, dtype=torch.bool)
    for mask_type in (AttnMaskType.no_mask, AttnMaskType.arbitrary, AttnMaskType.padding):
        actual = run(build(SDPACoreAttention, mask_type), tensors)
        assert_same(actual, run_dense(tensors, everything))


def test_a_causal_attention_ignores_the_mask_tensor():
    tensors = draw()
    nonsense = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    assert_same(run(build(SDPACoreAttention), tensors, nonsense), run_dense(tensors, causal(9)))


@pytest.mark.parametrize("groups", [4, 2])
def test_dropout_draws_from_megatrons_tracker(groups):
    core = build(SDPACoreAttention, groups=groups, attention_dropout=0.3)
    tensors = draw(groups)
    seed_everything(11)
    before = torch.get_rng_state()
    first = core(*tensors, None)
    # The global generator's state does not change, the tracker's does.
    assert torch.equal(torch.get_rng_state(), before)
    second = core(*tensors, None)
    assert not torch.equal(first, second)
    seed_everything(11)
    torch.rand(7)  # the state of the global generator does not matter
    assert torch.equal(core(*tensors, None), first)
    seed_everything(12)
    assert not torch.equal(core(*tensors, None), first)


def test_dropout_is_off_in_evaluation_and_unbiased_in_training():
    core = build(SDPACoreAttention, attention_dropout=0.5)
    tensors = draw(batch=1)
    expected = run_dense(tensors, causal(9))[0]
    state = get_cuda_rng_tracker().get_states()
    assert_close_rel("output", core.eval()(*tensors, None), expected)
    assert all(torch.equal(state[k], v) for k, v in get_cuda_rng_tracker().get_states().items())
    core.train()
    mean = torch.stack([core(*tensors, None) for _ in range(400)]).mean(0)
    # 400 samples: within a few standard errors, and far from half of it, the mean without scaling.
    assert_close_rel("mean", mean, expected, rel=0.15)


def test_dropout_given_at_construction_overrides_the_configuration():
    config = transformer_config(attention_dropout=0.5)
    core = SDPACoreAttention(config, 1, AttnMaskType.causal, "self", attention_dropout=0.0)
    tensors = draw()
    assert_same(run(core, tensors), run_dense(tensors, causal(9)))


def test_output_keeps_dtype_and_layout():
    query, key, value = (x.detach().bfloat16() for x in draw())
    output = build(SDPACoreAttention)(query, key, value, None)
    assert output.dtype == torch.bfloat16
    assert output.shape == (9, 2, HEADS * HEAD_SIZE)
    assert output.is_contiguous()


def test_it_has_no_parameters():
    core = build(SDPACoreAttention)
    assert not core.state_dict()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"softmax_type": "learnable"}, r"softmax_type='learnable'.*--softmax-type vanilla"),
        ({"softmax_type": "off-by-one"}, r"softmax_type='off-by-one'.*--softmax-type vanilla"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(fields, named):
    config = transformer_config()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=named):
        SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


def test_unsupported_mask_types_are_refused_by_name():
    config = transformer_config()
    core, tensors = build(SDPACoreAttention), draw()
    for mask_type in set(AttnMaskType) - {
        AttnMaskType.causal,
        AttnMaskType.no_mask,
        AttnMaskType.padding,
        AttnMaskType.arbitrary,
    }:
        with pytest.raises(ValueError, match=rf"attn_mask_type={mask_type}.*causal"):
            SDPACoreAttention(config, 1, mask_type, "self")
        with pytest.raises(ValueError, match=rf"attn_mask_type={mask_type}.*causal"):
            core(*tensors, None, attn_mask_type=mask_type)


def test_an_attention_bias_is_refused_by_name():
    with pytest.raises(ValueError, match="attention_bias"):
        build(SDPACoreAttention)(*draw(), None, attention_bias=torch.zeros(1))


@pytest.mark.parametrize("mask_type", [AttnMaskType.no_mask, AttnMaskType.arbitrary])
def test_packed_documents_are_causal_or_refused(mask_type):
    tensors = [x.squeeze(1) for x in draw(batch=1)]
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_kv=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match=f"attn_mask_type={mask_type.name}.*causal mask type"):
        build(SDPACoreAttention, mask_type)(*tensors, None, packed_seq_params=packed)


@pytest.mark.parametrize("window", [None, (0, 0), (2, 0), (20, 0), (-1, 0)])
def test_one_packed_document_equals_an_unpacked_sample(window):
    fields = {} if window is None else {"window_size": window}
    core, tensors = build(SDPACoreAttention, **fields), draw(batch=1)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_kv=torch.tensor([0, 9]))

    def attend(query, key, value, _):
        flat = [x.squeeze(1) for x in (query, key, value)]
        output = core(*flat, None, packed_seq_params=packed)
        assert output.shape == (9, HEADS * HEAD_SIZE)
        return output.unsqueeze(1)

    assert_same(run(attend, tensors), run(core, tensors))
