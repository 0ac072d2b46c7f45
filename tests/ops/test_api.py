"""The shift against loops over tokens: values and gradients, and planted errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshift_megatron.ops import kv_shift, shift_ref
from tests.support.compare import assert_close_rel

LAYOUTS = {"sbhd": (7, 2, 3, 4), "thd": (7, 3, 4)}
WINDOWS = (2, 3, 4)


def shift_by_loops(x, taps):
    """Shift one token and one group at a time, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for group in range(x.shape[-2]):
            for back in range(len(taps)):
                if token - back >= 0:
                    weight = float(taps[back][group])
                    out[token, ..., group, :] += weight * x[token - back, ..., group, :].double()
    return out


def draw(shape, window, seed=0, dtype=torch.float32):
    """Return (x, taps), normal: taps leave [0, 1] and do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    taps = torch.randn(window, shape[-2], generator=generator, dtype=torch.float64)
    return x, taps.to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_loops_over_tokens(shape, window):
    key, alpha = draw(shape, window, seed=1)
    value, beta = draw((*shape[:-1], shape[-1] + 3), window, seed=2)
    shifted_key, shifted_value = kv_shift(key, value, alpha, beta)
    assert_close_rel("key", shifted_key, shift_by_loops(key, alpha))
    assert_close_rel("value", shifted_value, shift_by_loops(value, beta))


@given(
    tokens=st.integers(1, 9),
    batch=st.none() | st.integers(1, 3),
    groups=st.integers(1, 4),
    head=st.integers(1, 5),
    window=st.sampled_from(WINDOWS),
    as_sequence=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equals_loops_over_tokens_at_any_shape(
    tokens, batch, groups, head, window, as_sequence, seed
):
    shape = (tokens, groups, head) if batch is None else (tokens, batch, groups, head)
    x, taps = draw(shape, window, seed, torch.float64)
    given_taps = tuple(taps) if as_sequence else taps
    torch.testing.assert_close(
        shift_ref(x, given_taps), shift_by_loops(x, taps), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["thd", "sbhd"])
def test_gradcheck_for_inputs_and_every_tap(batch, tokens, window):
    key, alpha = draw((tokens, *batch, 2, 3), window, 3, torch.float64)
    value, beta = draw((tokens, *batch, 2, 2), window, 4, torch.float64)
    taps = [tap.clone().requires_grad_() for tap in (*alpha, *beta)]

    def shift(key, value, *taps):
        return kv_shift(key, value, taps[:window], taps[window:])

    assert torch.autograd.gradcheck(shift, (key.requires_grad_(), value.requires_grad_(), *taps))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_tap_beyond_the_sequence_gets_a_zero_gradient(window):
    x, taps = draw((1, 2, 3), window)
    taps = [tap.requires_grad_() for tap in taps.unbind()]
    out = shift_ref(x, torch.stack(taps))
    out.sum().backward()
    assert torch.equal(out, taps[0][:, None] * x)
    assert taps[0].grad.any()
    assert not any(tap.grad.any() for tap in taps[1:])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
def test_first_tap_one_and_the_others_zero_is_the_identity(shape, window):
    x, taps = draw(shape, window)
    taps = torch.zeros_like(taps)
    taps[0] = 1.0
    assert torch.equal(shift_ref(x, taps), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", WINDOWS)
def test_half_precision_costs_one_rounding_of_the_fp32_result(window, dtype):
    x, taps = draw((64, 2, 3, 16), window, dtype=dtype)
    out = shift_ref(x, taps)
    assert out.dtype == dtype
    # The definition in fp32, one product and one sum at a time, rounded once.
    expected = torch.zeros(x.shape)
    for back in range(window):
        expected[back:] += taps[back][:, None] * x[: len(x) - back].float()
    assert torch.equal(out, expected.to(dtype))
    # Against the exact value: half a unit in the last place, plus the error of fp32.
    exact = shift_by_loops(x, taps)
    magnitude = shift_by_loops(x.abs(), taps.abs())
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + window * torch.finfo().eps * magnitude
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((out.double() - exact).abs() <= bound + subnormal).all()
    # The same sums in half precision would not pass.
    naive = taps[0].to(dtype)[:, None] * x
    for back in range(1, window):
        naive[back:] += taps[back].to(dtype)[:, None] * x[:-back]
    assert ((naive.double() - exact).abs() > bound + subnormal).any()


@pytest.mark.parametrize("tap_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_keep_the_input_dtype(dtype, tap_dtype):
    x, taps = draw((5, 2, 3), 2, dtype=dtype)
    taps = taps.to(tap_dtype)
    key, value = kv_shift(x, x, taps, taps)
    assert key.dtype == value.dtype == dtype
    # The rounding of bf16 inputs; FP32_REL for wider ones.
    rel = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    assert_close_rel("key", key, shift_by_loops(x, taps), rel=rel)


def test_slices_of_a_mixed_tensor_are_neither_changed_nor_aliased():
    # [s, b, ng, (np / ng + 2) * hn], split as Megatron splits it
    mixed = torch.randn(6, 2, 3, 4 * 5, dtype=torch.float64, requires_grad=True)
    before = mixed.detach().clone()
    _, key, value = torch.split(mixed, [10, 5, 5], dim=3)
    assert not key.is_contiguous()
    alpha, beta = torch.randn(2, 3), torch.randn(2, 3)
    shifted_key, shifted_value = kv_shift(key, value, alpha, beta)
    torch.testing.assert_close(shifted_key, shift_by_loops(key.detach(), alpha))
    torch.testing.assert_close(shifted_value, shift_by_loops(value.detach(), beta))
    assert torch.equal(mixed, before)
    storage = mixed.untyped_storage().data_ptr()
    for out in (shifted_key, shifted_value):
        assert out.untyped_storage().data_ptr() != storage
    # The gradient reaches the slices and nothing else.
    (shifted_key.sum() + shifted_value.sum()).backward()
    assert not mixed.grad[..., :10].any()
    assert mixed.grad[..., 10:].all()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_single_token_is_copied(window):
    x, taps = draw((1, 2, 3, 4), window)
    taps[0] = 1.0
    out = shift_ref(x, taps)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


def test_no_taps_leave_the_tensor_as_it_came():
    x, taps = draw((5, 2, 3), 2)
    y = torch.randn(5, 2, 3)
    key, value = kv_shift(x, y, None, taps)
    assert key is x
    assert_close_rel("value", value, shift_by_loops(y, taps))
    key, value = kv_shift(x, y, taps, None)
    assert value is y
    assert_close_rel("key", key, shift_by_loops(x, taps))


def _taps_swapped(x, taps):
    return shift_ref(x, taps.flip(0))


def _shifted_by_two(x, taps):
    return shift_ref(x, torch.stack((taps[0], torch.zeros_like(taps[0]), taps[1])))


def _taps_of_another_group(x, taps):
    return shift_ref(x, taps.roll(1, dims=1))


def _wrapped_around(x, taps):
    return taps[0][:, None] * x + taps[1][:, None] * torch.roll(x, 1, dims=0)


def _next_token(x, taps):
    return shift_ref(x.flip(0), taps).flip(0)


def _along_the_batch(x, taps):
    return shift_ref(x.transpose(0, 1), taps).transpose(0, 1)


def _in_place(x, taps):
    out = x.clone()
    for token in range(1, len(x)):
        out[token] = taps[0][:, None] * x[token] + taps[1][:, None] * out[token - 1]
    return out


@pytest.mark.parametrize(
    "wrong",
    [
        _taps_swapped,
        _shifted_by_two,
        _taps_of_another_group,
        _wrapped_around,
        _next_token,
        _along_the_batch,
        _in_place,
    ],
)
def test_the_comparator_catches_a_planted_error(wrong):
    x, taps = draw((64, 2, 3, 4), 2)
    expected = shift_by_loops(x, taps)
    assert_close_rel("key", shift_ref(x, taps), expected)
    with pytest.raises(AssertionError, match="key: relative error"):
        assert_close_rel("key", wrong(x, taps), expected)


@pytest.mark.parametrize("windows", [(2, 3), (3, 2)])
def test_keys_and_values_may_have_windows_of_their_own(windows):
    key, alpha = draw(LAYOUTS["sbhd"], windows[0], seed=1)
    value, beta = draw(LAYOUTS["sbhd"], windows[1], seed=2)
    shifted_key, shifted_value = kv_shift(key, value, alpha, beta)
    assert_close_rel("key", shifted_key, shift_by_loops(key, alpha))
    assert_close_rel("value", shifted_value, shift_by_loops(value, beta))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_position_that_counts_tokens_before_the_first_one_here(dtype):
    """Part of a longer document: tokens before the first one count as zero."""
    x, taps = draw(LAYOUTS["thd"], 3)
    position = torch.arange(5, 12, dtype=dtype)
    for out in kv_shift(x, x, taps, taps, position):
        assert_close_rel("out", out, shift_by_loops(x, taps))
