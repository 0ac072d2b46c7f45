"""The shift on a GPU, against its definition in float64 on the CPU."""

import pytest
import torch

from kvshift_megatron.ops import kv_shift
from kvshift_megatron.ops.dispatch import implementation
from tests.support.shift_cases import SHAPES, assert_right, shift_errors

# Rounding to the dtype: at most half a unit in the last place of each element.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_every_gradient(shape, dtype, window):
    assert implementation(torch.empty(shape, device="cuda", dtype=dtype)) == "triton"
    assert_right(shift_errors(shape, dtype, window, "cuda"), ROUNDING[dtype])


@pytest.mark.parametrize("shifted", ["keys", "values"])
def test_only_keys_or_values(shifted):
    k, v = torch.randn(2, 50, 2, 3, 64, device="cuda", dtype=torch.bfloat16)
    taps = torch.randn(2, 3, device="cuda")
    alpha, beta = (taps, None) if shifted == "keys" else (None, taps)
    both = kv_shift(k, v, taps, taps)
    alone = kv_shift(k, v, alpha, beta)
    changed, kept = (0, 1) if shifted == "keys" else (1, 0)
    assert torch.equal(alone[changed], both[changed])
    assert alone[kept] is (k, v)[kept]


def test_the_same_inputs_give_the_same_bits():
    torch.manual_seed(0)
    k, v, k_grad, v_grad = torch.randn(4, 2048, 4, 16, 128, device="cuda", dtype=torch.bfloat16)
    taps = torch.randn(2, 16, device="cuda", requires_grad=True)
    grads = []
    for _ in range(5):
        outputs = kv_shift(k, v, taps, taps)
        grads.append(torch.autograd.grad(outputs, taps, (k_grad, v_grad))[0])
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_it_works_with_torch_compile_and_cuda_graphs():
    torch.manual_seed(0)
    k, v = torch.randn(2, 64, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
    alpha, beta = torch.randn(2, 2, 4, device="cuda")
    expected = kv_shift(k, v, alpha, beta)
    compiled = torch.compile(kv_shift, fullgraph=True)(k, v, alpha, beta)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kv_shift(k, v, alpha, beta)
    k.mul_(2)
    v.mul_(2)
    graph.replay()
    assert all(torch.equal(a, 2 * b) for a, b in zip(captured, expected))


def test_forcing_kernels_on_unsupported_inputs_is_refused(monkeypatch):
    x, taps = torch.randn(8, 1, 2, 16, device="cuda"), torch.ones(2, 2, device="cuda")
    assert implementation(x.double()) == "eager"
    monkeypatch.setenv("KVSHIFT_IMPLEMENTATION", "triton")
    with pytest.raises(ValueError, match=r"KVSHIFT_IMPLEMENTATION=triton.*float64"):
        kv_shift(x.double(), x.double(), taps, taps)
    monkeypatch.setenv("KVSHIFT_IMPLEMENTATION", "cuda")
    with pytest.raises(ValueError, match=r"auto or one of .*, not 'cuda'"):
        kv_shift(x, x, taps, taps)
