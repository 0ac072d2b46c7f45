"""Statistics of seconds, and the order of turns."""

import pytest
import torch

from tools.benchmarks import timing
from tools.benchmarks.stepping import order_of_round


def test_spread():
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
        "min": 1.0,
        "max": 5.0,
        "count": 5,
    }
    assert timing.spread([7.0])["upper_quartile"] == 7.0
    with pytest.raises(ValueError, match="at least one"):
        timing.spread([])


def test_the_order_of_turns():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = timing.time_in_turns(candidates, "cpu", 1e-9, (2, 9), lambda *_: None)
    warm_up, rounds = calls[:6], calls[6:]
    assert warm_up == list("aabbcc")
    # The fewest rounds, as there is no budget for more.
    assert rounds == list("abc" + "bca")
    assert all(len(values) == 2 and min(values) >= 0 for values in times.values())
    assert order_of_round(["a", "b"], 0) == ["a", "b"]
    assert order_of_round(["a", "b"], 1) == ["b", "a"]


def test_rounds_go_on_within_the_budget():
    ticks = iter(range(100))
    times = timing.time_in_turns(
        {"a": lambda: None}, "cpu", 5.5, (1, 50), lambda *_: None, clock=lambda: next(ticks)
    )
    assert len(times["a"]) == 5  # the clock says 1 to 5, then 6


def test_a_call_on_a_gpu_is_timed_behind_a_pause(monkeypatch):
    """The GPU must wait until the host has queued the call, or the host's time counts too."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(cycles))
    assert timing.seconds_of(lambda: order.append("call"), "cuda") == 0.003
    assert order == [timing._QUEUE_CYCLES, "record", "call", "record", "synchronize"]
