"""The Triton kernels in Triton's interpreter on the CPU, and what they save and copy."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvshift_megatron.ops import kv_shift, trial
from kvshift_megatron.ops.dispatch import implementation
from kvshift_megatron.ops.triton import launch, rope_launch, self_check
from kvshift_megatron.ops.triton.launch import strided
from tests.ops.triton.triton_worker import interpreted
from tests.support.shift_cases import assert_right

pytestmark = pytest.mark.slow

# The interpreter truncates instead of rounding: a whole unit in the last place.
ROUNDING = {"fp32": 1e-6, "fp16": 2**-10, "bf16": 2**-7}


def test_every_output_and_gradient_is_the_definition():
    found = interpreted()["shift"]
    cases = {name: errors for name, errors in found.items() if name != "planted"}
    assert len(cases) == 4 * (3 + 1 + 1) + 2 + 1
    for name, errors in cases.items():
        dtype = name.split(", ")[-2] if "window" in name else "fp32"
        assert len(errors) == (4 if "alone" in name else 8)
        assert_right(errors, ROUNDING[dtype])


def test_the_comparison_sees_a_kernel_that_forgets_a_tap():
    with pytest.raises(AssertionError, match="output"):
        assert_right(interpreted()["shift"]["planted"], ROUNDING["fp32"])


def saved_bytes(queries: int) -> int:
    """Return what one layer saves for the backward pass on a GPU, in multiples of the keys."""
    tokens, groups, head = 64, 4, 32
    mixed = torch.empty(
        tokens, 1, groups, (queries + 2) * head, device="meta", dtype=torch.bfloat16
    ).requires_grad_()
    _, key, value = (mixed * 1).split([queries * head, head, head], dim=-1)
    taps = torch.empty(2, groups, device="meta", requires_grad=True)
    kept = {}

    def keep(tensor):
        if tensor.dim() == 4:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = kv_shift(key, value, taps, taps)
    assert [x.shape for x in outputs] == [key.shape, value.shape]
    return sum(kept.values()) // (tokens * groups * head * 2)


def test_no_more_than_the_raw_keys_and_values_is_kept_for_the_backward_pass():
    """With one query head per group mixed_qkv is kept; with twelve, copies of keys and values."""
    assert implementation(torch.empty(2, 1, 1, 8, device="meta")) == "triton"
    assert saved_bytes(queries=1) == 3
    assert saved_bytes(queries=12) == 2


def test_groups_too_far_apart_for_32_bits_are_moved_together():
    far = torch.empty(1, 16, 2**20, 128, device="meta").permute(2, 0, 1, 3)
    assert far.stride(2) * far.size(2) == 2**31
    assert strided(far)[3] == 128
    assert strided(far[:, :, :15])[3] == 2**27


def test_no_axis_of_the_grid_but_the_first_is_longer_than_65535():
    for shape in ((1, 70_000, 1, 8), (1, 1, 280_000, 8), (70_000, 1, 1, 8192), (9, 2, 3, 8)):
        x, taps = torch.empty(shape, device="meta"), torch.empty(2, shape[2], device="meta")
        freqs = torch.empty(shape[0], 8, device="meta")
        grid, _, plain = launch._launch([x] * 2, [taps] * 2, None)
        fused, rope = rope_launch._launch([x] * 2, [taps] * 2, None, freqs, None, False)
        for (first, second, third), constants in ((grid, plain), (fused, rope)):
            programs = -(-shape[0] // constants["BLOCK_S"]) * shape[1] * shape[2]
            assert first * second * constants.get("HEADS", 1) == programs
            assert second <= 65535 and third == 2
            assert constants["ONE_AXIS"] is (second == 1 < shape[1] * shape[2])


def test_the_trial_is_on_real_tensors_whatever_mode_is_on(monkeypatch):
    # A number cannot be read from a tensor without data.
    monkeypatch.setattr(trial, "largest_error", lambda *_: float(torch.ones(3).sum()) - 3)
    self_check._checked.cache_clear()
    try:
        with FakeTensorMode():
            assert self_check.self_check("cpu", torch.float32, "shift") is None
    finally:
        self_check._checked.cache_clear()
