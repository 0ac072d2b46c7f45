"""Runs the shift's Triton kernels in Triton's interpreter; started by test_triton_shift.py.

The interpreter has to be chosen before Triton is first imported, hence a process of its own.
Prints {case: {quantity: relative error}} as JSON.
"""

import json

import torch

from kvshift_megatron.ops import triton_shift
from tests.shift_cases import SHAPES, shift_errors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    found = {}
    for name, shape in SHAPES.items():
        for dtype, windows in {"fp32": (2, 3, 4), "fp16": (2,), "bf16": (2,)}.items():
            for window in windows:
                errors = shift_errors(shape, DTYPES[dtype], window, "cpu")
                found[f"{name}, {dtype}, window {window}"] = errors
    for kind in "kv":
        found[f"{kind} alone"] = shift_errors(SHAPES["thd"], torch.float32, 2, "cpu", kind)
    with_planted_error = triton_shift._launch
    triton_shift._launch = lambda *args: _short_window(*with_planted_error(*args))
    found["planted"] = shift_errors(SHAPES["sbhd, odd sizes"], torch.float32, 3, "cpu")
    triton_shift._launch = with_planted_error
    check_operator()
    print(json.dumps(found))


def _short_window(grid, sizes, constants):
    return grid, sizes, {**constants, "WINDOW": constants["WINDOW"] - 1}


def check_operator() -> None:
    """torch's own checks: schema, fake implementation, autograd, ahead-of-time dispatch."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(9, 2, 3, 16, generator=generator, requires_grad=True) for _ in range(2)]
    taps = [torch.randn(2, 3, generator=generator, requires_grad=True) for _ in range(2)]
    position = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3])
    for arguments in ((x, taps, None), (x[:1], taps[:1], position)):
        torch.library.opcheck(triton_shift._shift_operator, arguments)


if __name__ == "__main__":
    main()
