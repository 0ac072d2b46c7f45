"""The shift with rotated keys on a GPU, against its definition in float64 and against TE."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb

from kvshift_megatron.ops import kv_shift_rope
from kvshift_megatron.ops.dispatch import implementation
from kvshift_megatron.ops.triton.self_check import self_check
from tests.support.compare import relative_error
from tests.support.rope_cases import CASES, Case, assert_rope, rope_errors

# Rounding to the dtype: at most half a unit in the last place of each element.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def angles(tokens: int, rotary: int, interleaved: bool = False) -> torch.Tensor:
    """Return fp32 [s, 1, 1, rotary], as from Megatron's RotaryEmbedding."""
    half = torch.arange(tokens)[:, None] * 10000 ** -(torch.arange(0, rotary, 2) / rotary)
    freqs = half.repeat_interleave(2, -1) if interleaved else half.repeat(1, 2)
    return freqs[:, None, None].cuda()


@pytest.mark.parametrize("name", CASES)
def test_values_and_every_gradient(name):
    case = CASES[name]
    assert implementation(torch.empty(1, device="cuda", dtype=case.dtype)) == "triton"
    assert_rope(rope_errors(case, "cuda"), ROUNDING[case.dtype])


@pytest.mark.parametrize("operator", ["shift", "rope_shift"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_self_check_before_the_first_use_passes(dtype, operator):
    assert self_check("cuda", dtype, operator) is None


@pytest.mark.parametrize("shape", [(3, 35_000, 2, 16), (3, 1, 70_000, 16)])
def test_more_heads_than_two_axes_of_a_grid_can_count(shape):
    case = Case(shape=shape, rotary=16)
    assert_rope(rope_errors(case, "cuda"), ROUNDING[case.dtype])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens, rotary", [(4096, 128), (200_000, 64)])
def test_identity_taps_give_transformer_engines_rotation(tokens, rotary, interleaved):
    """Beyond an angle of 105615, sine and cosine reduce it in another, slower way."""
    torch.manual_seed(0)
    key = torch.randn(tokens, 1, 2, 128, device="cuda", dtype=torch.bfloat16)
    taps = torch.tensor([[1.0], [0.0]], device="cuda").repeat(1, 2)
    freqs = angles(tokens, rotary, interleaved)
    rotated, _ = kv_shift_rope(key, key, taps, None, freqs, interleaved=interleaved)
    expected = fused_apply_rotary_pos_emb(key, freqs, interleaved=interleaved)
    print(f"elements that differ in a bit: {(rotated != expected).float().mean():.1e}")
    assert relative_error(rotated, expected) < 1e-4
    assert relative_error(rotated[1:], expected[:-1]) > 0.1


def test_an_index_outside_of_the_angles_gives_nan():
    key, taps = torch.randn(8, 2, 64, device="cuda"), torch.randn(2, 2, device="cuda")
    index = torch.tensor([0, 1, 2, 3, 0, 1, 2, 4], device="cuda")
    rotated, value = kv_shift_rope(key, key, taps, taps, angles(4, 64), freq_index=index)
    assert rotated[:7].isfinite().all() and rotated[7].isnan().all() and value.isfinite().all()


def test_the_same_inputs_give_the_same_bits():
    torch.manual_seed(0)
    k, v, k_grad, v_grad = torch.randn(4, 2048, 4, 16, 128, device="cuda", dtype=torch.bfloat16)
    taps = torch.randn(2, 16, device="cuda", requires_grad=True)
    grads = []
    for _ in range(5):
        outputs = kv_shift_rope(k, v, taps, taps, angles(2048, 128))
        grads.append(torch.autograd.grad(outputs, taps, (k_grad, v_grad))[0])
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_it_works_with_torch_compile_and_cuda_graphs():
    torch.manual_seed(0)
    k, v = torch.randn(2, 64, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
    alpha, beta = torch.randn(2, 2, 4, device="cuda")
    freqs = angles(64, 64)
    expected = kv_shift_rope(k, v, alpha, beta, freqs)
    compiled = torch.compile(kv_shift_rope, fullgraph=True)(k, v, alpha, beta, freqs)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kv_shift_rope(k, v, alpha, beta, freqs)
    k.mul_(2)
    v.mul_(2)
    graph.replay()
    assert all(torch.equal(a, 2 * b) for a, b in zip(captured, expected))
