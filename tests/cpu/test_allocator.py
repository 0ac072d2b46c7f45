"""Freed memory is kept: new tensors cause no page faults, and `give_back` restores glibc's ways."""

import os
import subprocess
import sys

import pytest
import torch

from kvshift_megatron import cpu
from kvshift_megatron.cpu import allocator
from tests.support.launch import PROJECT

pytestmark = pytest.mark.slow

SETTINGS = (
    allocator.VARIABLE,
    "GLIBC_TUNABLES",
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


@pytest.fixture(autouse=True)
def no_user_settings(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert allocator._glibc() is not None and not cpu.is_enabled()
    yield
    allocator.give_back()


# In its own process: the heap of a long-running one may have free space that cannot be trimmed.
_FAULTS = """
import resource
import torch
from kvshift_megatron import cpu
from kvshift_megatron.cpu import allocator

def faults(x, rounds):
    # Page faults of three copies of x, once glibc's limits have settled.
    for _ in range(rounds):
        x.clone()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        x.clone()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# Above 32 MB glibc maps every block, however often one was freed.
x = torch.zeros(40 * 2**18)
found = [faults(x, 16)]
with cpu.cpu_device_layer(force=True):
    assert allocator.keep_freed_memory()
    found.append(faults(x, 16))
# Larger than any free space that may be left in the heap below a block in use.
found.append(faults(torch.zeros(200 * 2**18), 1))
print(*found)
"""


def test_tensors_need_no_fresh_pages_while_the_layer_is_on():
    run = subprocess.run(
        [sys.executable, "-c", _FAULTS],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    before, kept, after = map(int, run.stdout.splitlines()[-1].split())
    # Even with huge pages: 3 * 40 MB in pages of 2 MB.
    assert before >= 50 and kept <= 10 and after >= 50, (before, kept, after)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (allocator.VARIABLE, "0"),
        ("MALLOC_MMAP_MAX_", "10"),
        ("MALLOC_MMAP_THRESHOLD_", "1000000"),
        ("MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.mmap_threshold=1000000"),
    ],
)
def test_the_users_settings_are_left_alone(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert allocator.keep_freed_memory() is False
    assert os.environ[name] == value
    monkeypatch.delenv(name)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert allocator.keep_freed_memory() is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is for CPU machines")
def test_other_c_libraries_are_left_alone(monkeypatch, capfd):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
    allocator.give_back()
    with cpu.cpu_device_layer(force=True) as enabled:
        assert enabled
    out, err = capfd.readouterr()
    assert "mallopt" not in out + err and "memory" not in out + err
