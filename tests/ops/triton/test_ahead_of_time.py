"""The Triton kernels compiled for GPUs that this machine lacks: registers, access widths, bytes."""

import pytest
import torch
import triton

from kvshift_megatron.ops.triton import launch
from tests.ops.triton.ahead_of_time import CASES, Case, compile_case, expected, per_element

pytestmark = pytest.mark.slow

# Bytes. Triton 3.6 spills a few registers, in other kernels in each run; 3.8 spills none.
MOST_SPILLED = 16 if triton.__version__.startswith("3.6.") else 0


def assert_lean(case: Case, capability: int, **layout) -> None:
    """Check that no register spills and that 128-bit accesses request the expected bytes."""
    kernels = compile_case(case, capability, **layout)
    assert len(kernels) == 2
    for kernel, requests in zip(kernels, expected(case)):
        assert kernel.spilled <= MOST_SPILLED, f"spills: {kernel}"
        assert per_element(kernel, case) == requests, f"requests: {kernel}"


@pytest.mark.parametrize("capability, case", CASES, ids=lambda value: str(value))
def test_no_spills_wide_accesses_and_every_byte_accounted_for(capability, case):
    assert_lean(case, capability)


def test_the_check_sees_strides_that_force_narrow_loads():
    with pytest.raises(AssertionError, match="requests"):
        assert_lean(Case(), 90, padding=1)


def test_the_check_sees_spilled_registers(monkeypatch):
    monkeypatch.setattr(launch, "_TILE", 4 * launch._TILE)
    with pytest.raises(AssertionError, match="spills"):
        assert_lean(Case(torch.float32), 90)


@pytest.mark.parametrize("case", [Case(), Case(rotary=128)], ids=str)
def test_the_check_sees_a_tensor_that_is_read_once_more(case):
    """Compile a window of three and expect one of two, forward and backward."""
    kernels = compile_case(Case(window=3, rotary=case.rotary), 90)
    for kernel, (reads, writes) in zip(kernels, expected(case)):
        found = per_element(kernel, case)
        assert found[0] >= reads + 1 and found[1] == writes
