"""Which implementation is chosen, and that a call chooses once."""

import logging

import pytest
import torch

from kvshift_megatron.ops import api, dispatch, eager, kv_shift, kv_shift_rope, shift_ref
from kvshift_megatron.ops.dispatch import VARIABLE, implementation
from kvshift_megatron.ops.triton import self_check
from tests.support.compare import relative_error


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
    dispatch._choices.clear()
    dispatch._log_once.cache_clear()
    monkeypatch.setenv(VARIABLE, "reference")
    with caplog.at_level(logging.INFO):
        assert implementation(torch.empty(1)) == "eager"
    assert f"implementation of the shift: eager ({VARIABLE}=eager)" in caplog.text


@pytest.fixture
def choices(monkeypatch):
    """Return the choices made so far."""
    made, choose = [], dispatch.choose

    def counted(shift):
        made.append(shift.operator)
        return choose(shift)

    monkeypatch.setattr(dispatch, "choose", counted)
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
def test_forward_and_backward_choose_once(device, is_rotated, choices, monkeypatch):
    run(device, is_rotated)  # the first choice asks for that of the plain shift as well
    choices.clear()
    run(device, is_rotated)
    rotation = ["rope_shift"] if device == "meta" else ["rope_shift", "shift"]
    assert choices == (rotation if is_rotated else ["shift"])


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


def test_a_window_that_the_compiled_kernel_lacks_is_shifted_in_plain_pytorch(monkeypatch, caplog):
    x, taps = torch.randn(12, 1, 2, 8), torch.randn(9, 2)
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = kv_shift(x, x, taps, taps[:8])
    if implementation(x) == "cpu":
        assert "eager (the compiled shift supports windows up to 8, not 9)" in caplog.text
    for output, own in zip(found, (taps, taps[:8])):
        assert relative_error(output, shift_ref(x.double(), own.double())) < 1e-6
    monkeypatch.setenv(VARIABLE, "cpu")
    with pytest.raises(
        ValueError, match=r"KVSHIFT_IMPLEMENTATION=cpu: .*(windows up to 8|compile)"
    ):
        kv_shift(x, x, taps, taps)


GPU = torch.device("cuda", 0)


@pytest.fixture
def trials(monkeypatch):
    """Pretend that there is a GPU; return what its trials find, by operator, and those that ran."""

    class Trials:
        found, ran, is_capturing = {}, [], False

    def why_wrong(kernels, *_):
        operator = "rope_shift" if "rotated" in kernels else "shift"
        trials.ran.append(operator)
        return trials.found.get(operator)

    trials = Trials()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: trials.is_capturing)
    monkeypatch.setattr("kvshift_megatron.ops.triton.self_check.why_wrong", why_wrong)

    def forget():
        self_check._checked.cache_clear()
        dispatch._log_once.cache_clear()
        for kept in (dispatch._choices, dispatch._untried, dispatch._given_up):
            kept.clear()

    forget()
    yield trials
    forget()


def on_gpu(operator="shift", window=2):
    return dispatch.choose(dispatch.Shift(GPU, torch.bfloat16, window, operator)).name


@pytest.mark.parametrize("wanted", ["auto", "triton"])
def test_a_failed_trial_of_the_rotating_kernels_leaves_the_plain_ones(wanted, trials, monkeypatch):
    monkeypatch.setenv(VARIABLE, wanted)
    trials.found = {"rope_shift": "the rotation is wrong"}
    assert on_gpu() == "triton"
    # Nobody who rotates separately pays for that trial, or is told of it.
    assert trials.ran == ["shift"]
    assert [on_gpu("rope_shift"), on_gpu()] == ["eager", "triton"]


def test_a_failed_trial_of_the_plain_kernels_condemns_both(trials, monkeypatch):
    trials.found = {"shift": "the shift is wrong"}
    assert [on_gpu(), on_gpu("rope_shift")] == ["eager", "eager"]
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match="=triton: the shift is wrong: set it to auto or eager"):
        on_gpu()


@pytest.mark.parametrize("operator", ["shift", "rope_shift"])
def test_the_trial_runs_once_a_graph_is_captured(operator, trials):
    trials.is_capturing = True
    assert on_gpu(operator) == "triton" and trials.ran == []
    trials.is_capturing = False
    assert on_gpu(operator) == "triton" and trials.ran == sorted({operator, "shift"})[::-1]
    before = list(trials.ran)
    assert on_gpu(operator) == "triton" and trials.ran == before


def test_kernels_that_a_graph_has_captured_and_that_fail_later_end_the_run(trials):
    trials.is_capturing = True
    assert on_gpu() == "triton"
    trials.is_capturing, trials.found = False, {"shift": "the shift is wrong"}
    with pytest.raises(RuntimeError, match=r"captured .* before their trial.*the shift is wrong"):
        on_gpu()


def test_without_a_trial_the_choice_of_a_traced_graph_is_not_kept(trials, monkeypatch):
    trials.found = {"shift": "the shift is wrong"}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert on_gpu() == "triton"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert on_gpu() == "eager"


def test_what_another_rank_cannot_run_is_given_up(trials):
    assert [on_gpu(), on_gpu("rope_shift")] == ["triton", "triton"]
    dispatch.give_up(dispatch.Shift(torch.device("cuda"), torch.bfloat16, 2, "rope_shift"), "no")
    assert [on_gpu(), on_gpu("rope_shift"), on_gpu("rope_shift", 3)] == [
        "triton",
        "eager",
        "triton",
    ]
    dispatch.give_up(dispatch.Shift(GPU, torch.bfloat16), "no")
    assert [on_gpu(), on_gpu(window=3)] == ["eager", "triton"]


def test_keys_are_rotated_after_the_plain_kernels_if_those_that_rotate_fail(monkeypatch):
    """On the CPU's kernel, which takes the place of Triton's."""
    torch.manual_seed(0)
    key, value = torch.randn(2, 12, 2, 3, 8, dtype=torch.float64).unbind()
    alpha, beta = torch.randn(2, 2, 3, dtype=torch.float64).unbind()
    freqs = torch.rand(12, 1, 1, 4).repeat(1, 1, 1, 2)
    expected = kv_shift_rope(key, value, alpha, beta, freqs, mscale=1.5)
    ran, original = [], eager.forward
    monkeypatch.setattr(eager, "forward", lambda *args: ran.append(1) or original(*args))
    answers = {"shift": "triton", "rope_shift": "eager"}
    monkeypatch.setattr(
        api, "implementation", lambda x, window, operator="shift": answers[operator]
    )
    found = kv_shift_rope(key, value, alpha, beta, freqs, mscale=1.5)
    assert ran == [1]
    for output, right in zip(found, expected):
        assert relative_error(output, right) < 1e-14


def test_compiling_for_tensors_without_data_traces_the_choice():
    x, taps = torch.empty(5, 1, 2, 8, device="meta"), torch.empty(2, 2, device="meta")
    outputs = torch.compile(kv_shift, fullgraph=True, backend="aot_eager")(x, x, taps, taps)
    assert [output.shape for output in outputs] == [x.shape] * 2
