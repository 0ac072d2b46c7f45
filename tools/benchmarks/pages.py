"""Measure what fresh memory pages cost on a CPU, with and without this package's setting."""

from kvshift_megatron.cpu.allocator import keep_freed_memory
from tools.benchmarks.inputs import Shape
from tools.benchmarks.operation import SHAPES, measure_case
from tools.benchmarks.settings import ReportProgress, Settings, part

_WAYS = ("paper", "pad_and_add", "compile", "eager", "chosen")


def measure(settings: Settings, progress: ReportProgress) -> dict:
    """Return {"system": case, "kept": case}, measured before and after `keep_freed_memory`."""
    shape = Shape(256, 2, 4, 64) if settings.quick else SHAPES[0]
    result: dict = {"refused": {}, "not_measured": {}}
    for i, name in enumerate(("system", "kept")):
        if name == "kept" and not keep_freed_memory():
            result["not_measured"]["kept pages"] = (
                "keep_freed_memory has no effect here (it needs glibc without user-set limits)"
            )
            break
        done = part(progress, i / 2, (i + 1) / 2)
        result[name] = measure_case(settings, "cpu", shape, "fp32", done, result, _WAYS, 6.0)
    return result
