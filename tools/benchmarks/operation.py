"""Measure the shift alone, forward, and forward and backward, in multiples of a plain copy."""

import gc
import shutil
import time

import torch

from kvshift_megatron.cpu.allocator import keep_freed_memory
from kvshift_megatron.ops.cpu import build
from kvshift_megatron.ops.dispatch import HAS_TRITON, why_not
from tools.benchmarks import timing
from tools.benchmarks.candidates import Candidate, Copies, candidates
from tools.benchmarks.correctness import Expected, WrongResult
from tools.benchmarks.inputs import Inputs, Shape, make_inputs
from tools.benchmarks.settings import ReportProgress, Settings, part

# Lower bounds, in copies: forward reads one tensor and writes one, as a copy does; backward reads
# the input and the output's gradient and writes the input's.
BOUND = {"forward": 1.0, "forward and backward": 2.5}

SHAPES = (Shape(2048, 4, 16, 128), Shape(12288, 1, 4, 128, queries=12))
_QUICK_SHAPES = (Shape(256, 2, 4, 64), Shape(512, 1, 2, 64, queries=6))
_SMALL_SHAPES = (Shape(67, 2, 3, 40), Shape(40, 1, 2, 128, queries=4))
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(settings: Settings, progress: ReportProgress) -> dict:
    """Return {"cases": [...], "refused": {label: why}, "not_measured": {label: why}, ...}."""
    kept = keep_freed_memory()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    shapes = _QUICK_SHAPES if settings.quick else SHAPES
    progress(0.0, "compiling this package's C code, unless it is cached")
    start = time.perf_counter()
    candidates("cpu", torch.float32)
    build_s = time.perf_counter() - start
    cases = [(d, s, name) for d in devices for s in shapes for name in _DTYPES]
    result: dict = {"cases": [], "refused": {}, "not_measured": {}, "build_seconds": build_s}
    result["keeps_freed_memory"] = kept
    if "cuda" not in devices:
        result["not_measured"]["GPU"] = "this machine has none"
    for i, (device, shape, dtype_name) in enumerate(cases):
        done = part(progress, i / len(cases), (i + 1) / len(cases))
        result["cases"].append(measure_case(settings, device, shape, dtype_name, done, result))
        gc.collect()
    return result


def measure_case(
    settings: Settings,
    device: str,
    shape: Shape,
    dtype_name: str,
    progress: ReportProgress,
    notes: dict,
    only: tuple[str, ...] | None = None,
    budget_s: float = 20.0,
) -> dict:
    """Measure one shape and dtype on one device.

    Args:
        settings, progress: As for `measure`.
        device, shape, dtype_name: What to measure.
        notes: What is refused or cannot be measured is added to its "refused" or "not_measured".
        only: Names of candidates; None for all.
        budget_s: Seconds for the rounds, unless the settings are quick.
    """
    dtype = _DTYPES[dtype_name]
    title = f"{device} {dtype_name} {shape}"
    ways = candidates(device, dtype)
    if "chosen" not in ways:
        kernels, label = ("cpu", "compiled C") if device == "cpu" else ("triton", "Triton")
        reason = why_not(kernels, torch.device(device), dtype)
        # Without a compiler or Triton there is nothing to measure; with one, something is broken.
        absent = not _has_c_compiler() if device == "cpu" else not HAS_TRITON
        notes["not_measured" if absent else "refused"][f"kvshift, {label}"] = f"{title}: {reason}"
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        ways.pop("compile")
        notes["not_measured"]["torch.compile"] = "no C++ compiler was found"
    ways = {name: way for name, way in ways.items() if only is None or name in only}
    compile_s = _refuse_wrong(ways, device, dtype, shape, progress, title, notes)

    inputs = make_inputs(shape, dtype, device)
    copies = Copies(inputs)
    calls = {"copy": copies.copy}
    for i, (name, way) in enumerate(ways.items()):
        if i == len(ways) // 2:  # far from the copy, which reads the same tensors
            calls["clone"] = copies.clone
        calls[f"{name}, forward"] = _bound(way.forward, inputs)
        calls[f"{name}, forward and backward"] = _bound(way.gradients, inputs)
    times = timing.time_in_turns(
        calls,
        device,
        *((0.5, (3, 5)) if settings.quick else (budget_s, (7, 40))),
        lambda fraction, text: progress(0.3 + 0.7 * fraction, f"{title}, {text}"),
    )
    summaries = {name: timing.spread(values) for name, values in times.items()}
    in_copies = {
        name: timing.spread(one / copy for one, copy in zip(values, times["copy"]))
        for name, values in times.items()
    }
    rows = [
        {
            "candidate": name,
            "label": ways[name].label,
            "own": ways[name].own,
            "pass": kind,
            "seconds": summaries[f"{name}, {kind}"],
            "copies": in_copies[f"{name}, {kind}"],
        }
        for kind in BOUND
        for name in ways
    ]
    bytes_moved = 2 * sum(x.nbytes for x in inputs.grads)
    return {
        "device": device,
        "shape": list(shape),
        "mixed_qkv": [shape.s, shape.b, shape.ng, (shape.queries + 2) * shape.hn],
        "dtype": dtype_name,
        "copy_seconds": summaries["copy"],
        "copy_bytes_per_second": bytes_moved / summaries["copy"]["median"],
        "clone_copies": in_copies["clone"],
        "compile_seconds": compile_s,
        "bound_copies": BOUND,
        "rows": rows,
    }


def check_chosen(device: str, dtype: torch.dtype) -> None:
    """Compare what this package chooses for such tensors with the definition, on small shapes.

    Raises:
        WrongResult: As for Expected.check.
    """
    ways = candidates(device, dtype)
    for shape in _SMALL_SHAPES:
        inputs = make_inputs(shape, dtype, device)
        Expected(inputs).check(ways.get("chosen", ways["eager"]), inputs)


def _has_c_compiler() -> bool:
    try:
        return bool(build.find_compiler())
    except build.BuildError:
        return False


def _bound(call, inputs: Inputs):
    return lambda: call(inputs)


def _refuse_wrong(
    ways: dict[str, Candidate],
    device: str,
    dtype: torch.dtype,
    shape: Shape,
    progress: ReportProgress,
    title: str,
    notes: dict,
) -> float | None:
    """Remove from `ways` what is wrong on small inputs or on the measured ones.

    Returns:
        Seconds of torch.compile's first call at the measured shape, with a warm or a cold cache.
    """
    compile_s = None
    shapes = (*_SMALL_SHAPES, shape)
    for i, checked in enumerate(shapes):
        progress(0.3 * i / len(shapes), f"{title}, comparing with the definition at {checked}")
        inputs = make_inputs(checked, dtype, device)
        expected = Expected(inputs)
        for name, way in list(ways.items()):
            if way.compiled:
                progress(0.3 * i / len(shapes), f"{title}, torch.compile at {checked}")
                torch.compiler.reset()  # else the shapes count as recompiles of one function
            try:
                start = time.perf_counter()
                if way.compiled:
                    way.gradients(inputs)
                first_s = time.perf_counter() - start
                expected.check(way, inputs)
            except WrongResult as error:
                notes["refused"][way.label] = f"{title}: {error}"
                del ways[name]
            except Exception as error:
                # That PyTorch cannot compile a form says nothing about this package.
                kind = "not_measured" if way.compiled else "refused"
                reason = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
                notes[kind][way.label] = f"{title}: {reason}"
                del ways[name]
            else:
                if way.compiled and checked is shape:
                    compile_s = first_s
    return compile_s
