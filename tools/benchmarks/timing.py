"""Timing candidates side by side: turn about, so that noise from outside hits all alike."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch

from tools.benchmarks.settings import ReportProgress

Call = Callable[[], object]

# The GPU idles this long first, so that the host has queued the call when it is timed.
_QUEUE_CYCLES = 1_000_000


def seconds_of(call: Call, device: str) -> float:
    """Seconds of one call on "cpu" or "cuda"; letting go of what it returns is included."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda._sleep(_QUEUE_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def turn_about(
    candidates: dict[str, Call],
    device: str,
    budget_s: float,
    rounds: tuple[int, int],
    progress: ReportProgress,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Seconds of every candidate, one call a round.

    A first round warms up and is not counted. Between two calls of a candidate all others run: what
    it reads has left the caches, as it has in a training step. Each round starts one further, so
    that none is always the first.

    Args:
        budget_s: no further round begins after this long, once there are enough.
        rounds: the fewest and the most.
    """
    for call in candidates.values():
        for _ in range(2):
            seconds_of(call, device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    fewest, most = rounds
    began = clock()
    for number in range(most):
        spent = clock() - began
        if number >= fewest and spent > budget_s:
            break
        progress(max(number / most, min(1.0, spent / budget_s)), f"round {number + 1}")
        first = number % len(candidates)
        order = list(candidates)
        for name in order[first:] + order[:first]:
            times[name].append(seconds_of(candidates[name], device))
    return times


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, quartiles, extremes and the count."""
    values = sorted(values)
    if not values:
        raise ValueError("spread needs at least one value")
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "lower_quartile": low,
        "upper_quartile": high,
        "min": values[0],
        "max": values[-1],
        "count": len(values),
    }
