"""Which implementation is chosen, and that a call chooses once."""

import logging

import pytest
import torch

from kvshift_megatron.ops import dispatch, eager, kv_shift, kv_shift_rope
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


@pytest.fixture
def choices(monkeypatch):
    """Return the choices made so far."""
    made, choose = [], dispatch._choose

    def counted(*arguments):
        made.append(choose(*arguments))
        return made[-1]

    monkeypatch.setattr(dispatch, "_choose", counted)
    return made


def run(device: str, is_rotated: bool) -> None:
    """Run one forward and one backward pass."""
    x = torch.zeros(5, 1, 2, 8, device=device, requires_grad=True)
    taps = torch.zeros(2, 2, device=device, requires_grad=True)
    if is_rotated:
        freqs = torch.zeros(5, 1, 1, 8, device=device)
        outputs = kv_shift_rope(x, x, taps, taps, freqs)
    else:
        outputs = kv_shift(x, x, taps, taps)
    sum(output.sum() for output in outputs).backward()
    assert x.grad.shape == x.shape and taps.grad.shape == taps.shape


@pytest.mark.parametrize("is_rotated", [False, True], ids=["shifted", "rotated"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_forward_and_backward_choose_once(device, is_rotated, choices):
    run(device, is_rotated)
    assert len(choices) == 1


def test_the_backward_pass_uses_what_the_forward_pass_chose(monkeypatch):
    ran, original = [], eager.backward
    monkeypatch.setattr(eager, "backward", lambda *args: ran.append(1) or original(*args))
    x, taps = torch.randn(5, 1, 2, 8, requires_grad=True), torch.randn(2, 2)
    for forward, backward in (("eager", "auto"), ("auto", "eager")):
        monkeypatch.setenv(VARIABLE, forward)
        outputs = kv_shift(x, x, taps, taps)
        monkeypatch.setenv(VARIABLE, backward)
        outputs[0].sum().backward()
        assert len(ran) == 1


def test_a_compiled_graph_chooses_when_it_runs(monkeypatch):
    x, taps = torch.randn(5, 1, 2, 8), torch.randn(2, 2)
    compiled = torch.compile(kv_shift, fullgraph=True, backend="aot_eager")
    compiled(x, x, taps, taps)
    ran, original = [], eager.forward
    monkeypatch.setattr(eager, "forward", lambda *args: ran.append(1) or original(*args))
    monkeypatch.setenv(VARIABLE, "eager")
    compiled(x, x, taps, taps)
    assert ran == [1]
