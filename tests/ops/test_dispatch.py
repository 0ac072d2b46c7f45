"""Which implementation is chosen."""

import logging

import pytest
import torch

from kvshift_megatron.ops import dispatch, kv_shift
from kvshift_megatron.ops.dispatch import VARIABLE, implementation


def test_a_cpu_takes_no_triton_and_a_forced_choice_is_honoured_or_refused(monkeypatch):
    x, taps = torch.randn(5, 1, 2, 8), torch.randn(2, 2)
    assert implementation(x) in ("cpu", "eager")
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"KVSHIFT_IMPLEMENTATION=triton: .* not on a GPU"):
        kv_shift(x, x, taps, taps)
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"auto or one of .*triton, not 'fast'"):
        kv_shift(x, x, taps, taps)


def test_the_old_name_of_eager_is_accepted(monkeypatch, caplog):
    for cached in (dispatch._choose, dispatch._log):
        cached.cache_clear()
    monkeypatch.setenv(VARIABLE, "reference")
    with caplog.at_level(logging.INFO):
        assert implementation(torch.empty(1)) == "eager"
    assert f"implementation of the shift: eager ({VARIABLE}=eager)" in caplog.text
