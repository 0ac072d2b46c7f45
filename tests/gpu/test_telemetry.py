"""GPU telemetry on a real GPU, through NVML.

Needs an NVIDIA driver, torch built for CUDA, and nothing else of this project's environment:

    pip install nvidia-ml-py pytest
    python -m pytest tests/gpu/test_telemetry.py --noconftest -s
    PYTHONPATH=. python tests/gpu/test_telemetry.py     # prints what a sample costs

from the project's root, with no other work on the GPU. Without a GPU the tests fail.
"""

import subprocess
import sys
import time

import pynvml
import pytest
import torch

from kvshift_megatron.training.metrics.nvml import CLOCK_REASONS, open_gpus
from kvshift_megatron.training.metrics.telemetry import Sampler

_ALL = {
    "gpu", "uuid", "utilization_percent", "memory_utilization_percent", "memory_used_bytes",
    "memory_total_bytes", "power_watts", "temperature_celsius", "throttle", "ecc_corrected",
    "ecc_uncorrected",
}  # fmt: skip


def uuids() -> list[str]:
    """Return NVML's names of the GPUs that CUDA counts."""
    count = torch.cuda.device_count()
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]


def keep_busy(seconds: float) -> None:
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def samples():
    """Return lines of 1 s idle, 4 s busy and 1 s with 4 GiB more memory in use, and warnings."""
    assert torch.cuda.is_available(), "these tests need a GPU"
    lines, warnings = [], []
    sampler = Sampler(
        lines.append, "here", uuids(), interval_s=0.25, iteration=lambda: 7, warn=warnings.append
    )
    assert sampler.start(), warnings
    time.sleep(1)
    idle = len(lines)
    keep_busy(4)
    busy = len(lines)
    held = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    torch.cuda.synchronize()
    time.sleep(1)
    sampler.stop()
    assert sampler._thread is None, "the thread did not end"
    del held
    print(*lines[:1], *lines[-1:], *warnings, sep="\n")
    return lines[:idle], lines[idle:busy], lines[busy:], warnings


def test_every_metric_is_present(samples):
    for line in [line for part in samples[:3] for line in part if "gpus" in line]:
        assert line["node"] == "here" and line["iteration"] == 7
        assert [gpu["gpu"] for gpu in line["gpus"]] == list(range(torch.cuda.device_count()))
        for gpu in line["gpus"]:
            assert gpu.keys() == _ALL
            assert all(reason in CLOCK_REASONS.values() for reason in gpu["throttle"])
    assert samples[3] == []


def test_load_is_measured(samples):
    """A busy GPU has a utilization near 100 %, more power than idle and a plausible temperature."""
    idle, busy = samples[0][0]["gpus"][0], samples[1][-1]["gpus"][0]
    assert busy["utilization_percent"] > 90
    assert busy["power_watts"] > idle["power_watts"] + 50
    assert 15 < busy["temperature_celsius"] < 110
    assert "gpu_idle" not in busy["throttle"]


def test_memory_agrees_with_torch(samples):
    """It is in bytes and of this GPU: allocating 4 GiB adds 4 GiB."""
    before, after = samples[1][-1]["gpus"][0], samples[2][-1]["gpus"][0]
    assert after["memory_used_bytes"] - before["memory_used_bytes"] >= 4 << 30
    assert after["memory_used_bytes"] - before["memory_used_bytes"] < 5 << 30
    total = torch.cuda.mem_get_info(0)[1]
    assert abs(after["memory_total_bytes"] - total) < 0.05 * total


def test_the_gpu_is_the_one_that_cuda_uses():
    pynvml.nvmlInit()
    for index, gpu in enumerate(open_gpus(pynvml, uuids(), pytest.fail)):
        assert gpu.uuid == uuids()[index]
        assert gpu.name == torch.cuda.get_device_name(index)
        assert gpu.is_device(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
    pynvml.nvmlShutdown()


def test_an_unknown_gpu_gives_one_warning():
    lines, warnings = [], []
    sampler = Sampler(lines.append, "here", ["GPU-no-such"], warn=warnings.append)
    assert not sampler.start()
    assert len(warnings) == 1 and "GPU-no-such" in warnings[0]
    assert not lines


def test_a_missing_driver_gives_one_warning(monkeypatch):
    """The warning holds NVML's own message about its missing library."""
    warnings = []

    def missing():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert not Sampler(list, "here", warn=warnings.append).start()
    assert len(warnings) == 1 and "NVML Shared Library Not Found" in warnings[0]


def test_a_process_ends_with_a_sampler_running():
    """The sampler's thread does not keep the interpreter from exiting."""
    program = (
        "import time; from kvshift_megatron.training.metrics.telemetry import Sampler;"
        "assert Sampler(print, 'here', interval_s=0.1).start(); time.sleep(1)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("'gpus'") >= 2 and not ended.stderr


if __name__ == "__main__":
    # The cost of a sample for the process that takes it.
    pynvml.nvmlInit()
    gpu = open_gpus(pynvml, uuids(), print)[0]
    gpu.read()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(100):
        gpu.read()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"{gpu.name}: a sample of one GPU takes {wall * 10:.2f} ms, {cpu * 10:.2f} ms of it CPU")
