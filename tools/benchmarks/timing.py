"""Time candidates in turns, so that outside noise affects all of them equally."""

import statistics
import time
from collections.abc import Callable, Iterable

import torch

from tools.benchmarks.settings import ReportProgress

Call = Callable[[], object]

# The GPU is kept busy this long first, so that the host has queued the call when timing begins.
_QUEUE_CYCLES = 1_000_000


def seconds_of(call: Call, device: str) -> float:
    """Return the seconds of one call on "cpu" or "cuda", including freeing what it returns."""
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


def time_in_turns(
    candidates: dict[str, Call],
    device: str,
    budget_s: float,
    rounds: tuple[int, int],
    progress: ReportProgress,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Return the seconds of every candidate, one call per round.

    Two calls of each candidate warm up and are not counted. Between two calls of a candidate all
    others run, so that what it reads has left the caches, as in a training step. Each round starts
    with the next candidate, so that none is always the first.

    Args:
        candidates: Calls, by name.
        device: "cpu" or "cuda".
        budget_s: Seconds after which no further round begins, once there are enough rounds.
        rounds: The fewest and the most rounds.
        progress: Called before each round.
        clock: Seconds; tests pass their own.
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
    """Return the median, quartiles, extremes and the count."""
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
