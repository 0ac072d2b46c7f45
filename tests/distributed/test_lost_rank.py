"""If a rank dies or hangs during the exchange, the others end in time and name it."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.support.launch import python_path

pytestmark = pytest.mark.slow

_RANKS, _LOST, _TIMEOUT = 3, 1, 6
_RANK = f"""
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from kvshift_megatron.attention.context_parallel import shift_across_boundaries

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds={_TIMEOUT}))
x = torch.randn(12, 1, 2, 4, requires_grad=True)
taps = torch.randn(2, 2)
for step in range(3):
    if step == 2 and dist.get_rank() == {_LOST}:
        if sys.argv[1] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    key, value = shift_across_boundaries(x, x, taps, taps, None, dist.group.WORLD)
    (key + value).sum().backward()
print("finished", flush=True)
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Not with torchrun, which would end the others itself.
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_others_end_in_time_and_name_it(how):
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    common |= {"WORLD_SIZE": str(_RANKS), "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, how],
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(_RANKS)
    ]
    start = time.monotonic()
    try:
        for rank in range(_RANKS):
            if rank == _LOST:
                continue
            # Starting up takes seconds on a busy machine; a hang would take 1000.
            output, _ = ranks[rank].communicate(timeout=10 * _TIMEOUT)
            assert ranks[rank].returncode not in (0, None)
            assert "finished" not in output
            named = re.search(rf"exchange of rank {rank} with rank (\d+) failed", output)
            assert named and int(named.group(1)) == _LOST, output[-3000:]
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    assert time.monotonic() - start < 10 * _TIMEOUT
