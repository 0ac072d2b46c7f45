"""The shift with rotated keys in Triton's interpreter on the CPU, and its definition."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from kvshift_megatron.ops import kv_shift_rope
from kvshift_megatron.ops.reference import rotate
from tests.ops.triton.triton_worker import interpreted
from tests.support.compare import relative_error
from tests.support.rope_cases import CASES, Case, assert_rope, rope_errors

pytestmark = pytest.mark.slow

# The interpreter truncates instead of rounding: a whole unit in the last place.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def test_every_output_and_gradient_is_the_rotated_shift():
    found = interpreted()["rope"]
    assert found.keys() == {*CASES, "one axis", "planted"}
    assert_rope(found["one axis"], ROUNDING[torch.float32])
    for name, case in CASES.items():
        assert len(found[name]) == 5 + len(case.kinds), name
        assert_rope(found[name], ROUNDING[case.dtype])


def test_the_comparison_sees_kernels_that_pair_other_channels():
    with pytest.raises(AssertionError, match="k output"):
        assert_rope(interpreted()["rope"]["planted"], ROUNDING[torch.float32])


def test_the_trial_before_the_first_choice_passes_and_names_what_is_wrong():
    found = interpreted()["self-check"]
    right = [said for name, said in found.items() if "planted" not in name]
    assert right == [None] * 6
    assert "kernels of the shift are wrong on cpu" in found["shift, planted"]
    assert "shift with rotated keys are wrong" in found["rope_shift, planted"]
    assert found["shift, planted in the rotation"] is None
    assert "shift with rotated keys are wrong" in found["rope_shift, planted in the rotation"]


@pytest.mark.parametrize("name", CASES)
def test_without_kernels_the_result_is_the_same(name, monkeypatch):
    monkeypatch.setenv("KVSHIFT_IMPLEMENTATION", "eager")
    assert_rope(rope_errors(CASES[name], "cpu"), ROUNDING[CASES[name].dtype])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary, mscale", [(16, 1.0), (8, 1.3)])
def test_the_rotation_is_megatrons(interleaved, rotary, mscale):
    torch.manual_seed(0)
    x = torch.randn(11, 2, 3, 16, dtype=torch.float64)
    angles = torch.randn(11, 1, 1, rotary // 2, dtype=torch.float64)
    freqs = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 1, 1, 2)
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=interleaved, multi_latent_attention=False
    )
    expected = apply_rotary_pos_emb(x, freqs, config, mscale=mscale, cp_group=object())
    assert relative_error(rotate(x, freqs, None, interleaved, mscale), expected) < 1e-14
    assert relative_error(rotate(x, freqs, None, not interleaved, mscale), expected) > 0.1


def test_no_more_than_the_raw_keys_and_values_is_kept_for_the_backward_pass():
    key, value = torch.empty(2, 32, 1, 4, 64, device="meta", dtype=torch.bfloat16).unbind()
    key, value = key.clone().requires_grad_(), value.clone().requires_grad_()
    taps = torch.empty(2, 4, device="meta", requires_grad=True)
    freqs = torch.empty(32, 1, 1, 64, device="meta")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        outputs = kv_shift_rope(key, value, taps, taps, freqs)
    assert [x.shape for x in outputs] == [key.shape, value.shape]
    # The angles too, as in Megatron's own rotation.
    sizes = sorted(x.numel() for x in kept)
    assert sizes == sorted([key.numel(), value.numel(), freqs.numel(), *[taps.numel()] * 2])


def test_the_comparison_sees_a_nan():
    errors = rope_errors(Case(), "cpu")
    errors["v taps"] = float("nan")
    with pytest.raises(AssertionError, match="v taps"):
        assert_rope(errors, ROUNDING[torch.float32])
