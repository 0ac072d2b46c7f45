"""Timing of calls on a GPU in the benchmarks."""

import time

import torch

from tools.benchmarks import timing


def test_the_pause_keeps_the_gpu_busy_until_the_call_is_queued():
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(timing._QUEUE_CYCLES)
    queued = time.perf_counter()
    torch.cuda.synchronize()
    # A few hundred microseconds at the clock of any GPU, while the host does not wait.
    assert 1e-4 < time.perf_counter() - start < 1e-2
    assert queued - start < 1e-4


def test_the_hosts_time_is_not_counted():
    x = torch.ones(1, device="cuda")

    def slow_to_queue():
        time.sleep(1e-4)
        x.add_(1)

    timing.seconds_of(slow_to_queue, "cuda")
    seconds = min(timing.seconds_of(slow_to_queue, "cuda") for _ in range(5))
    assert seconds < 5e-5
