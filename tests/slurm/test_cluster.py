"""The cluster of the tests: it is isolated, and ends with the process that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.slurm.jobs import ROOT
from tests.support.saved_tensors import differing

_STARTER = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster

with Cluster(Path(sys.argv[1])) as cluster:
    cluster.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000")
    while "RUNNING" not in cluster.run("squeue", "--states=RUNNING", "--noheader", "--format=%T"):
        time.sleep(0.1)
    while cluster.try_run("pgrep", "--exact", "sleep").returncode:
        time.sleep(0.1)
    print("up", flush=True)
    time.sleep(1000)
"""


def test_there_is_only_a_loopback_interface(cluster):
    interfaces = cluster.run("cat", "/proc/net/dev").splitlines()[2:]
    assert [line.partition(":")[0].strip() for line in interfaces] == ["lo"]
    addresses = cluster.run("ip", "-4", "-oneline", "address").splitlines()
    assert addresses
    assert all("inet 127." in line for line in addresses)


def test_everything_ends_with_the_process_that_started_it(tmp_path):
    base = tmp_path / "cluster"
    starter = subprocess.Popen(
        [sys.executable, "-c", _STARTER, str(base)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert starter.stdout.readline() == "up\n"
        running = mentioning(base)
        assert {"munged", "slurmctld", "slurmd", "sleep"} <= set(running.values())
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        starter.stdout.close()
    deadline = time.monotonic() + 10
    while (left := mentioning(base)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == {}


def mentioning(base: Path) -> dict[int, str]:
    """Return pid -> name of the processes whose command line or environment names the folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            if str(base).encode() in words:
                found[int(entry.name)] = (entry / "comm").read_text().strip()
        except OSError:
            continue  # ended meanwhile
    return found


def test_the_comparison_of_checkpoints_sees_one_bit():
    one = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    other = {name: tensor.clone() for name, tensor in one.items()}
    assert differing(one, other) == []
    other["a"][1] = -0.0
    assert differing(one, other) == ["a"]
    assert differing(one, {"a": one["a"]}) == ["b"]
