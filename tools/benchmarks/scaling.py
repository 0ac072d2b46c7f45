"""Measure how the cost grows: of the operation with tokens and heads, of the step with ranks."""

import importlib.util

import torch

from kvshift_megatron.cpu.allocator import keep_freed_memory
from kvshift_megatron.ops.dispatch import VARIABLE
from tools.benchmarks.inputs import Shape
from tools.benchmarks.model_flags import model_flags
from tools.benchmarks.operation import measure_case
from tools.benchmarks.settings import ReportProgress, Settings, part
from tools.benchmarks.stepping import Run
from tools.benchmarks.training_step import BASELINE, measure_runs

_WAYS = ("eager", "chosen")

# Layout -> (ranks, flags).
LAYOUTS = {
    "1 rank": (1, []),
    "TP 2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "CP 2": (2, ["--context-parallel-size", "2"]),
}


def measure(settings: Settings, progress: ReportProgress) -> dict:
    """Return {"operation": {"sequence": [case, ...], "heads": [...]}, "layouts": {name: runs}}."""
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict = {"operation": {}, "layouts": {}, "refused": {}, "not_measured": {}}
    shapes = _shapes(settings.quick)
    count = sum(map(len, shapes.values()))
    done = 0
    for axis, along in shapes.items():
        cases = result["operation"][axis] = []
        for shape in along:
            this = part(progress, 0.4 * done / count, 0.4 * (done + 1) / count)
            cases.append(measure_case(settings, device, shape, "bf16", this, result, _WAYS, 4.0))
            done += 1
    if device == "cuda":
        result["not_measured"]["layouts"] = (
            "each of their ranks needs a GPU"
            if importlib.util.find_spec("transformer_engine")
            else "Megatron's layers for a GPU need Transformer Engine"
        )
        return result
    model = {"layers": 4, "hidden": 256, "heads": 8, "query_groups": 8, "batch": 2}
    model["seq_length"] = 128 if settings.quick else 512
    rounds, steps = (2, 2) if settings.quick else (8, 4)
    for i, (name, (ranks, layout)) in enumerate(LAYOUTS.items()):
        flags = model_flags(**model) + layout
        folder = settings.folder / name.replace(" ", "-")
        folder.mkdir()
        runs = {
            BASELINE: Run("vanilla", [*flags, "--no-kv-shift"], ranks),
            "kv_shift": Run("kv-shift", flags, ranks, {VARIABLE: "auto"}),
        }
        tokens = model["seq_length"] * model["batch"]
        start, size = 0.4 + 0.6 * i / len(LAYOUTS), 0.6 / len(LAYOUTS)
        this = part(progress, start, start + size)
        result["layouts"][name] = measure_runs(runs, tokens, rounds, steps, folder, this)
    return result | {"model": model}


def _shapes(quick: bool) -> dict[str, list[Shape]]:
    if quick:
        return {
            "sequence": [Shape(s, 2, 4, 64) for s in (128, 256)],
            "heads": [Shape(256, 2, ng, 64) for ng in (2, 4)],
        }
    return {
        "sequence": [Shape(s, 4, 16, 128) for s in (512, 1024, 2048, 4096)],
        "heads": [Shape(2048, 4, ng, 128) for ng in (2, 4, 8, 32)],
    }
