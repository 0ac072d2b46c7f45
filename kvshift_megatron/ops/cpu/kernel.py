"""The shift on a CPU by a compiled kernel (kernel.c): one pass over memory in each direction."""

import ctypes
import functools
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshift_megatron.ops.autograd import empty
from kvshift_megatron.ops.cpu import build
from kvshift_megatron.ops.cpu.turns import BuildError

SOURCE = Path(__file__).with_suffix(".c")
# As in kernel.c.
MAX_WINDOW = 8

_DTYPES = (torch.float32, torch.bfloat16)
# Products in one fp32 sum, at most; the sums of all blocks are added in float64.
_PRODUCTS = 512
_LANES = 16  # fp32 numbers of the longest vector
# With fewer elements, waking other threads costs more than it saves; torch's own grain.
_GRAIN = 32768
# With more bytes of output, the caches would not hold them until they are read.
_PAST_CACHES = 16 * 2**20


class _Side(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "out", "taps", "dtaps", "partial")),
        ("x_strides", ctypes.c_int64 * 3),
        ("dy_strides", ctypes.c_int64 * 3),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("sides", _Side * 2),
        ("position", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("count", "tokens", "samples", "groups", "head", "window"),
                *("block", "is_bf16", "past_caches", "threads"),
            )
        ),
        *((name, ctypes.c_void_p) for name in ("sums", "parallel", "thread", "team")),
    ]


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernel supports the dtype: fp32 or bf16."""
    return dtype in _DTYPES


@functools.cache
def why_not() -> str | None:
    """Return a clause that says why the kernel cannot run on this machine; None if it can.

    The first call compiles it, unless the cache holds a compiled one.
    """
    machine = (sys.platform, platform.machine())
    if machine not in (("linux", "x86_64"), ("linux", "aarch64")) or sys.byteorder != "little":
        return f"the compiled kernel is for Linux on x86_64 and aarch64, not {' on '.join(machine)}"
    try:
        _entries()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def _entries() -> tuple[Any, ...]:
    """Return the kernel and the addresses of the three OpenMP functions that it calls."""
    kernel = build.load(SOURCE).kvshift_run
    kernel.argtypes, kernel.restype = [ctypes.c_void_p], None
    # Those of torch's own runtime: a second one would start threads of its own.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        torch_cpu = ctypes.CDLL(str(library))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        openmp = [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value for name in names]
    except (OSError, AttributeError) as error:
        raise BuildError(f"torch has no OpenMP runtime to share threads with: {error}") from error
    return kernel, *openmp


def forward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    past_caches: bool | None = None,
) -> list[Tensor]:
    """Return `shift_ref` of keys and values in one call, or of one of them; contiguous.

    Args:
        inputs: one or two [s, b, ng, hn] of the same shape and dtype (fp32 or bf16), any strides.
        taps: as many fp32 [window, ng], with a window of at most 8.
        position: int64 [s], or None.
        past_caches: whether outputs bypass the caches; None for those that would not fit in them.
    """
    outputs = [empty(x) for x in inputs]
    _run(inputs, taps, position, outputs, past_caches=past_caches)
    return outputs


def backward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    output_grads: Sequence[Tensor],
    past_caches: bool | None = None,
) -> list[Tensor]:
    """Return the gradients of the inputs, then those of the taps (fp32 [window, ng]).

    The number of threads does not change a bit of them.
    """
    input_grads = [empty(x) for x in inputs]
    tap_grads = [empty(tap) for tap in taps]
    _run(inputs, taps, position, input_grads, output_grads, tap_grads, past_caches)
    return [*input_grads, *tap_grads]


def _run(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    outputs: Sequence[Tensor],
    output_grads: Sequence[Tensor] = (),
    tap_grads: Sequence[Tensor] = (),
    past_caches: bool | None = None,
) -> None:
    if reason := why_not():
        raise RuntimeError(f"the CPU kernel of the shift cannot run: {reason}")
    kernel, *openmp = _entries()
    shape, dtype = inputs[0].shape, inputs[0].dtype
    tokens, samples, groups, head = shape
    elements = inputs[0].numel()
    if elements == 0:
        for grad in tap_grads:
            grad.zero_()
        return
    window = len(taps[0])
    _check(inputs, taps, output_grads, position)
    block = min(tokens, max(1, _PRODUCTS * _LANES // (samples * head)))
    count = len(inputs)
    size = inputs[0].element_size()
    threads = torch.get_num_threads() if count * elements > _GRAIN else 1

    # Keep references: the tensors made here have to outlive the call.
    inputs = [_with_rows(x) for x in inputs]
    output_grads = [_with_rows(dy) for dy in output_grads]
    taps = [tap.contiguous() for tap in taps]
    if position is not None:
        position = position.contiguous()
    if output_grads:
        blocks = -(-tokens // block)
        size_of_sums = (count, blocks, window, groups)
        partial = torch.empty(size_of_sums, dtype=torch.float64, device="cpu")
        # Not on the threads' stacks, which many groups would overrun.
        sums = torch.empty(threads, window, groups, _LANES, device="cpu")

    call = _Call()
    for n, (x, tap, out) in enumerate(zip(inputs, taps, outputs)):
        side = call.sides[n]
        side.x, side.out, side.taps = x.data_ptr(), out.data_ptr(), tap.data_ptr()
        side.x_strides[:] = [stride * size for stride in x.stride()[:3]]
        if output_grads:
            dy = output_grads[n]
            side.dy, side.dtaps = dy.data_ptr(), tap_grads[n].data_ptr()
            side.partial = partial.data_ptr() + n * partial.stride(0) * 8
            side.dy_strides[:] = [stride * size for stride in dy.stride()[:3]]
    call.position = None if position is None else position.data_ptr()
    call.count, call.window, call.block = count, window, block
    call.tokens, call.samples, call.groups, call.head = tokens, samples, groups, head
    call.is_bf16 = dtype == torch.bfloat16
    aligned = head * size % 64 == 0 and all(out.data_ptr() % 64 == 0 for out in outputs)
    if past_caches is None:
        past_caches = count * elements * size >= _PAST_CACHES
    call.past_caches = aligned and past_caches
    call.threads = threads
    call.sums = sums.data_ptr() if output_grads else None
    call.parallel, call.thread, call.team = openmp
    kernel(ctypes.byref(call))


def _check(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    output_grads: Sequence[Tensor],
    position: Tensor | None,
) -> None:
    """Raise ValueError for tensors that would make the kernel read other memory."""
    first = inputs[0]
    alike = all(
        x.shape == first.shape and x.dtype == first.dtype and x.device.type == "cpu"
        for x in (*inputs, *output_grads)
    )
    window = len(taps[0])
    fitting = all(
        tap.shape == (window, first.shape[2])
        and (tap.dtype, tap.device.type) == (torch.float32, "cpu")
        for tap in taps
    )
    placed = position is None or (
        (position.dtype, position.device.type) == (torch.int64, "cpu")
        and position.shape == first.shape[:1]
    )
    if not (alike and fitting and placed and supports(first.dtype) and window <= MAX_WINDOW):
        raise ValueError(
            "the CPU kernel of the shift takes keys and values of the same shape and dtype (fp32 "
            f"or bf16), fp32 taps [window, ng] with a window of at most {MAX_WINDOW} and an int64 "
            "position [s], all on the CPU: set KVSHIFT_IMPLEMENTATION=eager for others"
        )


def _with_rows(x: Tensor) -> Tensor:
    """Return x, or a copy of it in which the elements of a head are contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
