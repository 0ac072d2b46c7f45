"""The shift as one node of autograd and one operator: tensors without data, and torch.compile."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kvshift_megatron.ops import kv_shift, kv_shift_rope
from tests.support.compare import assert_close_rel
from tests.support.launch import python_path


def test_tensors_without_data_are_shaped_and_not_read():
    mode, real = FakeTensorMode(), (torch.randn(5, 2, 3), torch.randn(2, 2))
    x, taps = (mode.from_tensor(tensor).requires_grad_() for tensor in real)
    with mode:
        key, value = kv_shift(x, x, taps, taps)
        (key.sum() + value.sum()).backward()
    assert key.shape == value.shape == x.grad.shape == real[0].shape
    assert taps.grad.shape == real[1].shape


def test_torch_compile_takes_it_in_one_graph():
    x, taps = torch.randn(7, 2, 3, 16), torch.randn(2, 3)
    results = []
    for function in (kv_shift, torch.compile(kv_shift, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, taps)]
        outputs = function(leaves[0], leaves[0], leaves[1], leaves[1])
        (outputs[0].sum() + outputs[1].square().sum()).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results):
        assert_close_rel("compiled", compiled, eager)


@pytest.mark.parametrize("is_rotated", [False, True], ids=["shifted", "rotated"])
def test_torch_compile_takes_a_gpus_kernels_in_one_graph(is_rotated):
    """Tensors on the meta device stand for a GPU's."""
    x = torch.empty(7, 2, 3, 16, device="meta", requires_grad=True)
    taps = torch.empty(2, 3, device="meta", requires_grad=True)
    freqs = torch.empty(7, 1, 1, 8, device="meta")
    calls = []

    def backend(module, inputs):
        calls.extend(str(node.target) for node in module.graph.nodes)
        return module

    @torch.compile(fullgraph=True, backend=backend)
    def compiled():
        if is_rotated:
            return kv_shift_rope(x, x, taps, taps, freqs)
        return kv_shift(x, x, taps, taps)

    sum(output.sum() for output in compiled()).backward()
    assert x.grad.shape == x.shape and taps.grad.shape == taps.shape
    assert f"kvshift_megatron.{'rope_' * is_rotated}shift.default" in calls


_IMPORTED_AGAIN = """
import gc, sys, torch
from kvshift_megatron.ops import kv_shift_rope as first

x, taps = torch.empty(5, 1, 2, 8, device="meta"), torch.empty(2, 2, device="meta")
arguments = x, x, taps, taps, torch.empty(5, 1, 1, 8, device="meta")
first(*arguments)
ours = [name for name in sys.modules if name.partition(".")[0] == "kvshift_megatron"]
before = {name: sys.modules.pop(name) for name in ours}
from kvshift_megatron.ops import kv_shift_rope as second

second(*arguments)
del second
sys.modules.update(before)
gc.collect()
reused = [torch.empty(size % 50 + 1) for size in range(100_000)]
print(first(*arguments)[0].shape)
"""


def test_a_second_import_leaves_the_first_ones_operators_alone():
    """In a process of its own: what had been freed would be called, and anything could happen."""
    command = [sys.executable, "-c", _IMPORTED_AGAIN]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([5, 1, 2, 8])\n"
