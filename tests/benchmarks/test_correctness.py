"""A wrong implementation is refused; those that are measured are right."""

import pytest
import torch

from kvshift_megatron.ops import kv_shift
from kvshift_megatron.ops.dispatch import VARIABLE
from tools.benchmarks import operation
from tools.benchmarks.candidates import Candidate, candidates
from tools.benchmarks.correctness import Expected, WrongResult
from tools.benchmarks.formulations import naive_pair, padded_sum
from tools.benchmarks.inputs import Shape, make_inputs
from tools.benchmarks.settings import Settings

SHAPE = Shape(19, 2, 3, 8, queries=2)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    # Candidates set it; monkeypatch restores it after the test.
    monkeypatch.setenv(VARIABLE, "auto")


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_formulation_equals_the_definition(dtype, window):
    inputs = make_inputs(SHAPE, dtype, "cpu", window)
    expected = Expected(inputs)
    ways = candidates("cpu", dtype)
    # The function that torch.compile gets, uncompiled: compiling takes seconds.
    ways["compile"] = Candidate("naive", naive_pair)
    for way in ways.values():
        errors = expected.check(way, inputs)
        assert len(errors) == 6


def test_keys_and_values_have_megatrons_strides():
    key, value = make_inputs(SHAPE, torch.float32, "cpu").leaves[:2]
    assert key.shape == (19, 2, 3, 8) and key.stride() == (192, 96, 32, 1)
    assert value.storage_offset() - key.storage_offset() == 8 == key.storage_offset() - 8


def _swapped(key, value, alpha, beta):
    return kv_shift(key, value, alpha.flip(0), beta)


def _later(key, value, alpha, beta):
    key, value = (x.flip(0) for x in (key, value))
    return tuple(x.flip(0) for x in kv_shift(key, value, alpha, beta))


def _values_as_they_are(key, value, alpha, beta):
    return padded_sum(key, alpha), padded_sum(value, beta) + 0.01 * value


def _wide(key, value, alpha, beta):
    return tuple(x.double() for x in kv_shift(key, value, alpha, beta))


def _nan(key, value, alpha, beta):
    return tuple(x * float("nan") for x in kv_shift(key, value, alpha, beta))


class _ForgetsATap(torch.autograd.Function):
    """Right in the forward pass; in the backward pass the second tap's gradient is missing."""

    @staticmethod
    def forward(ctx, key, value, alpha, beta):
        ctx.save_for_backward(key, value, alpha, beta)
        return naive_pair(key, value, alpha, beta)

    @staticmethod
    def backward(ctx, *grads):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            found = torch.autograd.grad(naive_pair(*leaves), leaves, grads)
        found[3][1] = 0
        return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("wrong", "tensor"),
    [
        (_swapped, "shifted key"),
        (_later, "shifted key"),
        (_values_as_they_are, "shifted value"),
        (_wide, "shifted key"),
        (_nan, "shifted key"),
        (_ForgetsATap.apply, "gradient of beta"),
    ],
)
def test_a_wrong_implementation_is_refused(wrong, tensor, dtype):
    inputs = make_inputs(SHAPE, dtype, "cpu")
    with pytest.raises(WrongResult, match=f"planted: {tensor}"):
        Expected(inputs).check(Candidate("planted", wrong), inputs)


def test_a_refused_candidate_is_named_and_not_timed(monkeypatch, tmp_path):
    ways = {"good": Candidate("good", kv_shift, own=True), "bad": Candidate("bad", _swapped)}
    monkeypatch.setattr(operation, "candidates", lambda *_: dict(ways))
    notes = {"refused": {}, "not_measured": {}}
    settings, steps = Settings(quick=True, folder=tmp_path), []
    case = operation.measure_case(
        settings, "cpu", SHAPE, "fp32", lambda *step: steps.append(step), notes
    )
    assert {row["candidate"] for row in case["rows"]} == {"good"}
    assert "shifted key differs from the definition" in notes["refused"]["bad"]
    assert all(0 <= fraction <= 1 for fraction, _ in steps)
