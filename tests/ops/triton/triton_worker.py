"""Run the shift's Triton kernels in Triton's interpreter; started by `interpreted`.

The interpreter has to be selected before Triton is first imported, hence a separate process, shared
by all tests. It prints {case: {quantity: relative error}} as JSON.
"""

import functools
import json
import os
import subprocess
import sys

import torch

from kvshift_megatron.ops.autograd import ROPE_SHIFT, SHIFT
from kvshift_megatron.ops.triton import launch, rope_launch, self_check
from tests.support.launch import PROJECT
from tests.support.rope_cases import CASES, Case, rope_errors
from tests.support.shift_cases import SHAPES, shift_errors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@functools.cache
def interpreted() -> dict:
    """Return what `main` prints; the parts are "shift", "rope" and "self-check"."""
    environment = {"TRITON_INTERPRET": "1", "KVSHIFT_IMPLEMENTATION": "triton"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton.triton_worker"],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def main() -> None:
    # The trial that precedes the first choice; below, again with faulty kernels.
    operators = ("shift", "rope_shift")
    checks = {
        f"{operator}, {name}": self_check.self_check("cpu", dtype, operator)
        for name, dtype in DTYPES.items()
        for operator in operators
    }
    shift = {}
    for name, shape in SHAPES.items():
        for dtype, windows in {"fp32": (2, 3, 4), "fp16": (2,), "bf16": (2,)}.items():
            for window in windows:
                errors = shift_errors(shape, DTYPES[dtype], window, "cpu")
                shift[f"{name}, {dtype}, window {window}"] = errors
    for kind in "kv":
        shift[f"{kind} alone"] = shift_errors(SHAPES["thd"], torch.float32, 2, "cpu", kind)
    rope = {name: rope_errors(case, "cpu") for name, case in CASES.items()}
    check_operators()
    launch._LONGEST_AXIS = 1  # as if there were more heads than an axis of a grid may count
    shift["one axis"] = shift_errors(SHAPES["sbhd, odd sizes"], torch.float32, 3, "cpu")
    rope["one axis"] = rope_errors(Case(), "cpu")
    launch._LONGEST_AXIS = 65535

    right, right_rope = launch._launch, rope_launch._launch
    launch._launch = lambda *args: _short_window(*right(*args))
    rope_launch._launch = lambda *args: _other_pairs(*right_rope(*args))
    shift["planted"] = shift_errors(SHAPES["sbhd, odd sizes"], torch.float32, 3, "cpu")
    rope["planted"] = rope_errors(Case(), "cpu")
    self_check._checked.cache_clear()
    for operator in operators:
        checks[f"{operator}, planted"] = self_check.self_check("cpu", torch.float32, operator)
    self_check._checked.cache_clear()
    launch._launch = right
    # Only the rotation is wrong now.
    for operator in operators:
        name = f"{operator}, planted in the rotation"
        checks[name] = self_check.self_check("cpu", torch.float32, operator)
    print(json.dumps({"shift": shift, "rope": rope, "self-check": checks}))


def _short_window(grid, sizes, constants):
    return grid, sizes, {**constants, "WINDOW": constants["WINDOW"] - 1}


def _other_pairs(grid, constants):
    return grid, {**constants, "INTERLEAVED": not constants["INTERLEAVED"]}


def check_operators() -> None:
    """Run torch's own checks: schema, fake implementation, autograd, ahead-of-time dispatch."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(9, 2, 3, 16, generator=generator, requires_grad=True) for _ in range(2)]
    taps = [torch.randn(2, 3, generator=generator, requires_grad=True) for _ in range(2)]
    position = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3])
    freqs = torch.randn(9, 4, generator=generator).repeat(1, 2)
    for arguments in ((x, taps, None), (x[:1], taps[:1], position)):
        torch.library.opcheck(SHIFT.forward, arguments)
    arguments = x, taps, position, freqs, position, False, 1.5
    torch.library.opcheck(ROPE_SHIFT.forward, arguments)


if __name__ == "__main__":
    main()
