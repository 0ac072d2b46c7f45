"""Compile the shift's Triton kernels for GPUs that this machine lacks, and analyse the result.

The project's own launch code runs on tensors without data, with a stand-in for Triton's driver that
names the GPU: Triton specialises, compiles and assembles exactly what it would there, but launches
nothing. `python -m tests.ops.triton.ahead_of_time` prints the table for DESIGN.md.
"""

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvshift_megatron.ops.triton import launch, rope_launch
from tests.ops.triton.ptx import count_accesses

_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass
class Kernel:
    """One compiled launch.

    Attributes:
        registers: per thread.
        spilled: bytes of registers spilled to memory; loads and stores.
        reads, writes: bytes that 128-bit accesses of the whole grid request.
        narrow: narrower accesses in the PTX: taps, positions and sums.
    """

    name: str
    registers: int
    spilled: int
    reads: int
    writes: int
    narrow: int


class _Driver:
    """What Triton asks of a driver before a launch."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Kernels are cached by device.
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Case:
    """Keys and values as views of mixed_qkv; rotary: rotated channels, 0 for the plain shift."""

    dtype: torch.dtype = torch.bfloat16
    head: int = 128
    window: int = 2
    packed: bool = False
    rotary: int = 0
    interleaved: bool = False

    def __str__(self):
        words = [str(self.dtype).removeprefix("torch."), f"head {self.head}"]
        words.append(f"window {self.window}")
        words += ["packed"] * self.packed
        if self.rotary:
            words.append(f"rotary {self.rotary}{' interleaved' * self.interleaved}")
        return ", ".join(words)


_FP16, _FP32 = torch.float16, torch.float32
PLAIN = [
    Case(), Case(packed=True), Case(_FP16), Case(_FP32), Case(head=64), Case(head=96),
    Case(_FP32, head=64, packed=True), Case(window=4, packed=True),
]  # fmt: skip
FUSED = [
    Case(rotary=128), Case(rotary=128, interleaved=True, packed=True), Case(_FP32, rotary=128),
    Case(head=64, rotary=64),
]  # fmt: skip
# Rarer cases, for one GPU.
FUSED_RARE = [
    Case(_FP16, rotary=128), Case(head=96, rotary=96), Case(rotary=64, packed=True),
    Case(rotary=64, interleaved=True), Case(_FP32, rotary=128, interleaved=True),
    Case(window=4, rotary=128, packed=True),
]  # fmt: skip
CASES = [(capability, case) for capability in (80, 90, 100) for case in PLAIN + FUSED]
CASES += [(90, case) for case in FUSED_RARE]
_TOKENS, _SAMPLES, _GROUPS = 4096, 2, 8


def compile_case(case: Case, capability: int, padding: int = 0) -> list[Kernel]:
    """Compile the forward and the backward launch; padding: elements after each group's values."""
    widths = [4 * case.head, case.head, case.head + padding]
    shape = (_TOKENS, _SAMPLES, _GROUPS)
    mixed = torch.empty(*shape, sum(widths), dtype=case.dtype, device="meta")
    inputs = [x[..., : case.head] for x in mixed.split(widths, dim=-1)[1:]]
    grads = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs]
    taps = [torch.empty(case.window, _GROUPS, device="meta") for _ in inputs]
    position = torch.empty(_TOKENS, dtype=torch.int64, device="meta") if case.packed else None
    module, arguments = launch, (inputs, taps, position)
    if case.rotary:
        freqs = torch.empty(_TOKENS, case.rotary, device="meta")
        module, arguments = rope_launch, (*arguments, freqs, position, case.interleaved, 1.0)
    return compile_launches(
        lambda: (module.forward(*arguments), module.backward(*arguments, grads)), capability
    )


def expected(case: Case) -> list[tuple[float, float]]:
    """Return (reads, writes) of the forward and the backward launch, per byte of keys and values.

    Each neighbour is requested again, from a cache that holds its row by then; device memory sees
    1 and 1 forward, 2 and 1 backward, and the angles once.
    """
    # Four heads share the angles. Without interleaving, only one half of them is read. Values,
    # half of the bytes, need none.
    angles = 4 * case.rotary * (1 if case.interleaved else 0.5)
    angles /= 2 * case.head * case.dtype.itemsize
    later = min(case.window, 2) / 4 + max(case.window - 2, 0)
    return [(case.window + angles / 4, 1), (case.window + 1 + angles * later, 1)]


def per_element(kernel: Kernel, case: Case) -> tuple[float, float]:
    """Return (reads, writes) per byte of keys and values, to compare with `expected`."""
    size = 2 * _TOKENS * _SAMPLES * _GROUPS * case.head * case.dtype.itemsize
    return kernel.reads / size, kernel.writes / size


def compile_launches(call: Callable[[], object], capability: int) -> list[Kernel]:
    """Compile the launches of `call`, on meta tensors, for a GPU; capability: 90 for sm_90."""
    found = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            self.device_caches.clear()
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_read(kernel, log.getvalue(), grid, kwargs))

    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        # No compilation cache: it does not hold what the assembler reports about registers.
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.runtime.driver.set_active(_Driver(capability))
        JITFunction.run = compile_only
        try:
            call()
        finally:
            JITFunction.run = run
            triton.runtime.driver.set_active(None)
    return found


def _read(kernel, log: str, grid: tuple[int, int, int], constants: dict) -> Kernel:
    # Channels beyond the head are masked.
    threads = grid[0] * grid[1] * kernel.metadata.num_warps * 32
    threads = threads * constants["HEAD"] // constants["BLOCK_D"]
    totals, narrow = {"ld": 0, "st": 0}, 0
    for z in range(grid[2]):
        counts, narrow_here = count_accesses(kernel.asm["ptx"], z, constants.get("HEADS", 1))
        narrow += narrow_here
        for kind in totals:
            totals[kind] += counts[kind] * threads
    spills = [int(number) for pair in _SPILLS.findall(log) for number in pair]
    assert spills, f"the assembler did not report registers: {log}"
    return Kernel(
        name=kernel.metadata.name,
        registers=max(int(number) for number in _REGISTERS.findall(log)),
        spilled=sum(spills),
        reads=totals["ld"],
        writes=totals["st"],
        narrow=narrow,
    )


def main() -> None:
    """Print a table: one line per kernel, with its registers on each GPU."""
    found = {}
    for capability, case in CASES:
        for direction, kernel in zip(("forward", "backward"), compile_case(case, capability)):
            assert kernel.spilled == 0, (capability, case, kernel)
            row = found.setdefault((str(case), direction, per_element(kernel, case)), {})
            row[capability] = kernel.registers
    print("| kernel | requests: reads, writes | registers on sm_80, sm_90, sm_100 |")
    print("| --- | --- | --- |")
    for (case, direction, (reads, writes)), registers in found.items():
        counts = ", ".join(str(registers.get(capability, "")) for capability in (80, 90, 100))
        print(f"| {case}: {direction} | {reads:.3g}, {writes:.3g} | {counts} |")


if __name__ == "__main__":
    main()
