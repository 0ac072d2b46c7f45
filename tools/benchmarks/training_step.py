"""Measure the whole training step in Megatron's loop against the baseline model's."""

import importlib.util
from pathlib import Path

import torch

from kvshift_megatron.cpu.allocator import VARIABLE as KEEP_MEMORY
from kvshift_megatron.ops.dispatch import VARIABLE
from tools.benchmarks import timing
from tools.benchmarks.model_flags import model_flags
from tools.benchmarks.settings import ReportProgress, Settings
from tools.benchmarks.stepping import Run, order_of_round

# As many query groups as heads, which gives the most to shift.
MODEL = {"layers": 8, "hidden": 512, "heads": 8, "query_groups": 8, "seq_length": 512, "batch": 2}
_QUICK_MODEL = MODEL | {
    "layers": 2,
    "hidden": 128,
    "heads": 4,
    "query_groups": 4,
    "seq_length": 128,
}

BASELINE = "vanilla"


def measure(settings: Settings, progress: ReportProgress) -> dict:
    """Measure each kind of run: tokens per second, peak memory, what a layer keeps for backward."""
    if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is None:
        return {"not_measured": {"GPU": "Megatron's layers for a GPU need Transformer Engine"}}
    model = _QUICK_MODEL if settings.quick else MODEL
    flags = model_flags(**model)
    if torch.cuda.is_available():
        flags.append("--bf16")
    runs = {
        BASELINE: Run("vanilla", [*flags, "--no-kv-shift"]),
        "kv_shift": Run("kv-shift", flags, 1, {VARIABLE: "auto"}),
        "kv_shift_eager": Run("kv-shift-plain-pytorch", flags, 1, {VARIABLE: "eager"}),
    }
    if not torch.cuda.is_available():
        runs["vanilla_fresh_pages"] = Run(
            "vanilla-fresh-pages", runs[BASELINE].flags, 1, {KEEP_MEMORY: "0"}
        )
    tokens = model["seq_length"] * model["batch"]
    rounds, steps = (2, 2) if settings.quick else (20, 1)
    result = measure_runs(runs, tokens, rounds, steps, settings.folder, progress)
    return {"model": model, "dtype": "bf16" if "--bf16" in flags else "fp32", **result}


def measure_runs(
    runs: dict[str, Run],
    tokens: int,
    rounds: int,
    steps: int,
    folder: Path,
    progress: ReportProgress,
) -> dict:
    """Measure windows of several runs in turns, and each run's figures at its end.

    Args:
        runs: Runs by name. The others are compared with BASELINE.
        tokens: Tokens per step.
        rounds, steps: Windows of each run, and steps per window.
        folder: Existing folder for logs and sockets.
        progress: Called as the runs proceed.

    Returns:
        {"runs": {name: {"tokens_per_second", "ratio" (to the baseline's window in the same round),
        "peak_bytes", "saved_bytes_a_layer"}}}; the first two are spreads.
    """
    try:
        progress(0.0, f"starting {len(runs)} runs of {next(iter(runs.values())).ranks} ranks")
        for run in runs.values():
            run.start(folder)
        for run in runs.values():
            run.wait_until_ready()
        for i, run in enumerate(runs.values()):
            progress(0.2 + 0.1 * i / len(runs), f"warming up {run.name}")
            run.window(2)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            progress(0.3 + 0.6 * number / rounds, f"window {number + 1} of {rounds}")
            for name in order_of_round(list(runs), number):
                speeds[name].append(steps * tokens / runs[name].window(steps))
        figures = {}
        progress(0.9, "ending the runs")
        for name, run in runs.items():
            ratios = [own / base for own, base in zip(speeds[name], speeds[BASELINE])]
            figures[name] = {
                "ranks": run.ranks,
                "environment": run.environment,
                "tokens_per_second": timing.spread(speeds[name]),
                "ratio": timing.spread(ratios),
                **run.ask_figures(),
            }
        for run in runs.values():
            run.wait_until_ended()
    finally:
        for run in runs.values():
            run.stop()
    return {"tokens_a_step": tokens, "steps_a_window": steps, "runs": figures}
