"""Arguments that kv_shift and kv_shift_rope refuse; the message names the argument."""

import pytest
import torch

from kvshift_megatron.ops import kv_shift, kv_shift_rope

_X, _TAPS = torch.randn(5, 2, 3), torch.randn(2, 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.randn(5, 3), _X, _TAPS, _TAPS), "key"),
        ((_X, torch.randn(5, 1, 1, 2, 3), _TAPS, _TAPS), "value"),
        ((_X.int(), _X, _TAPS, _TAPS), "key"),
        ((_X, _X.long(), _TAPS, _TAPS), "value"),
        ((_X, _X, _TAPS[:1], _TAPS), "alpha"),
        ((_X, _X, _TAPS, _TAPS[:0]), "beta"),
        ((_X, _X, torch.randn(2, 3), _TAPS), "alpha_1"),
        ((_X, _X, _TAPS, (torch.randn(2), torch.randn(1))), "beta_2"),
        ((_X, _X, (*_TAPS, torch.randn(2, 1)), _TAPS), "alpha_3"),
        ((_X, _X, torch.randn(2), _TAPS), "alpha_1"),
    ],
)
def test_a_misfit_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError) as caught:
        kv_shift(*arguments)
    assert str(caught.value).split()[0] == named


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"alpha": _TAPS.to("meta")}, "alpha must be on cpu"),
        ({"beta": tuple(_TAPS.to("meta"))}, "beta must be on cpu"),
        ({"position": torch.arange(4)}, "position must be of shape"),
        ({"position": torch.arange(5, device="meta")}, "position must be of shape"),
    ],
)
def test_what_a_kernel_could_not_read_is_refused_by_name(change, named):
    arguments = {"key": _X, "value": _X, "alpha": _TAPS, "beta": _TAPS, **change}
    with pytest.raises(ValueError, match=named):
        kv_shift(**arguments)


def test_what_the_kernels_cannot_rotate_is_refused():
    key = torch.randn(6, 1, 2, 16)
    freqs, taps = torch.randn(6, 1, 1, 16), torch.randn(2, 2)
    for wrong, message in (
        (freqs[:5], "angles for 5 positions and key has 6 tokens"),
        (freqs.double(), "freqs must be fp32"),
        (freqs.expand(6, 3, 1, 16), r"freqs must be \[positions, 1, 1, rotary\]"),
        (freqs[..., :7], "an even rotary of at most 16"),
    ):
        with pytest.raises(ValueError, match=message):
            kv_shift_rope(key, key, taps, taps, wrong)
    with pytest.raises(ValueError, match=r"alpha_1 must be of shape \[2\]"):
        kv_shift_rope(key, key, torch.randn(2, 3), taps, freqs)
