"""The sampler against a stand-in for NVML: what it writes, and what it does when NVML fails."""

import inspect
import json
import sys
import time

import pytest

from kvshift_megatron.training.metrics.json_lines import JsonLines, read_lines
from kvshift_megatron.training.metrics.nvml import CLOCK_REASONS
from kvshift_megatron.training.metrics.telemetry import Sampler
from tests.training.metrics import fake_nvml as fake
from tests.training.metrics.fake_nvml import FakeGPU, fake_nvml

_TIMEOUT = 20


class Watched:
    """A running sampler, its lines and its warnings."""

    def __init__(self, gpus=2, uuids=None, interval_s=0.02, **fail):
        self.gpus = [FakeGPU(number) for number in range(gpus)]
        self.nvml = fake_nvml(self.gpus)
        self.nvml.fail = fail
        self.lines, self.warnings = [], []
        self.sampler = Sampler(
            self.lines.append,
            "node-3",
            uuids,
            interval_s,
            iteration=lambda: 17,
            nvml=self.nvml,
            warn=self.warnings.append,
        )

    def __enter__(self):
        self.started = self.sampler.start()
        return self

    def __exit__(self, *_):
        self.sampler.stop()

    def wait(self, condition):
        """Wait until a condition holds."""
        end = time.monotonic() + _TIMEOUT
        while not condition():
            assert time.monotonic() < end, (self.lines[-1:], self.warnings)
            time.sleep(0.005)

    def samples(self):
        return [line for line in list(self.lines) if "gpus" in line]

    def next_sample(self):
        # A sample with the old values may be in progress.
        count = len(self.samples()) + 2
        self.wait(lambda: len(self.samples()) >= count)
        return self.samples()[-1]["gpus"]


def test_a_sample_holds_every_metric_in_its_unit():
    with Watched() as watched:
        watched.gpus[1].reasons = 0x4 | 0x40 | 0x1000
        watched.gpus[1].ecc = {0: 12, 1: 3}
        second = watched.next_sample()[1]
    assert second == {
        "gpu": 1,
        "uuid": "GPU-0000-1",
        "utilization_percent": 91,
        "memory_utilization_percent": 40,
        "memory_used_bytes": 11 << 30,
        "memory_total_bytes": 80 << 30,
        "power_watts": 651.0,
        "temperature_celsius": 61,
        "throttle": ["sw_power_cap", "hw_thermal_slowdown", "0x1000"],
        "ecc_corrected": 12,
        "ecc_uncorrected": 3,
    }
    line = watched.samples()[-1]
    assert line["node"] == "node-3" and line["iteration"] == 17 and line["xid_events"] == 0
    assert abs(line["time"] - time.time()) < _TIMEOUT
    assert not watched.warnings


def test_only_the_jobs_gpus_in_cudas_order():
    with Watched(gpus=4, uuids=["GPU-0000-3", "GPU-0000-1"]) as watched:
        gpus = watched.next_sample()
    assert [(gpu["gpu"], gpu["uuid"]) for gpu in gpus] == [(0, "GPU-0000-3"), (1, "GPU-0000-1")]


def test_sampling_never_happens_in_the_callers_thread():
    with Watched(interval_s=1000) as watched:
        watched.wait(watched.samples)
        calls = dict(watched.nvml.calls)
        time.sleep(0.1)
    assert calls["nvmlDeviceGetPowerUsage"] == len(watched.gpus)
    assert watched.sampler._thread is None and watched.nvml.calls["nvmlShutdown"] == 1


@pytest.mark.parametrize(
    ("fail", "uuids", "words"),
    [
        ({"nvmlInit": fake.NVML_ERROR_LIBRARY_NOT_FOUND}, None, "Shared Library Not Found"),
        ({"nvmlDeviceGetCount": fake.NVML_ERROR_UNKNOWN}, None, "Unknown Error"),
        ({}, ["GPU-gone"], "GPU-gone"),
    ],
)
def test_a_failing_nvml_is_one_warning(fail, uuids, words):
    with Watched(uuids=uuids, **fail) as watched:
        assert not watched.started
    assert len(watched.warnings) == 1 and words in watched.warnings[0]
    assert watched.lines == []


def test_no_gpu_is_one_warning():
    with Watched(gpus=0) as watched:
        assert not watched.started
    assert watched.warnings == [
        "kvshift_megatron: node-3: no GPU telemetry: NVML sees no GPU on this node"
    ]


def test_an_absent_pynvml_is_one_warning_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    warnings = []
    assert not Sampler(list, "here", warn=warnings.append).start()
    assert len(warnings) == 1 and "pip install nvidia-ml-py" in warnings[0]


METRICS = {
    "utilization": ("nvmlDeviceGetUtilizationRates", "utilization_percent"),
    "memory": ("nvmlDeviceGetMemoryInfo", "memory_used_bytes"),
    "power": ("nvmlDeviceGetPowerUsage", "power_watts"),
    "ecc": ("nvmlDeviceGetTotalEccErrors", "ecc_corrected"),
}


@pytest.mark.parametrize("metric", METRICS)
def test_a_call_that_fails_later_disables_its_metric_on_its_gpu_alone(metric):
    call, key = METRICS[metric]
    with Watched() as watched:
        before = watched.next_sample()
        watched.nvml.fail = {call: lambda gpu: fake.NVML_ERROR_UNKNOWN if gpu == 0 else None}
        first, second = watched.next_sample()
        watched.nvml.fail = {}
        later = watched.next_sample()
    lost = before[0].keys() - first.keys()
    assert key in lost and lost < before[0].keys() - {"gpu", "uuid"}
    assert len(lost) <= 2
    assert second.keys() == before[1].keys()
    assert key not in later[0]
    assert len(watched.warnings) == 1 and metric in watched.warnings[0]


@pytest.mark.parametrize(
    ("newer", "key"),
    [
        ("nvmlDeviceGetTemperatureV", "temperature_celsius"),
        ("nvmlDeviceGetCurrentClocksEventReasons", "throttle"),
    ],
)
@pytest.mark.parametrize("absent", [True, False])
def test_an_older_driver_or_module_answers_the_older_call(newer, key, absent):
    watched = Watched(**{newer: fake.NVML_ERROR_FUNCTION_NOT_FOUND})
    if absent:
        delattr(watched.nvml, newer)
    with watched:
        assert all(key in gpu for gpu in watched.next_sample())
    assert not watched.warnings


def test_a_lost_gpu_leaves_the_others():
    with Watched() as watched:
        watched.next_sample()
        lost = {name: fake.NVML_ERROR_GPU_IS_LOST for name in vars(watched.nvml) if "Get" in name}
        watched.nvml.fail = {
            name: lambda gpu, code=code: code if gpu == 0 else None for name, code in lost.items()
        }
        first, second = watched.next_sample()
    assert first == {"gpu": 0, "uuid": "GPU-0000-0"}
    assert len(second) == 11
    assert all("GPU is lost" in warning for warning in watched.warnings)


def test_an_xid_error_is_written_every_time_and_printed_once():
    with Watched(interval_s=1000) as watched:
        watched.wait(watched.samples)
        # The GPU has fallen off the bus and no longer answers.
        watched.nvml.fail = {"nvmlDeviceGetUUID": fake.NVML_ERROR_GPU_IS_LOST}
        for _ in range(3):
            watched.nvml.send(watched.gpus[1], fake.EVENT_XID, 79)
        watched.nvml.send(watched.gpus[0], fake.EVENT_DOUBLE_BIT, 0)
        watched.nvml.send(None, fake.EVENT_XID, 31)
        watched.wait(lambda: len(watched.lines) == 6)
        watched.sampler._sample()
    events = [line for line in watched.lines if "event" in line]
    found = [(line["event"], line["gpu"], line["code"]) for line in events]
    assert found == [("xid", 1, 79)] * 3 + [("double_bit_ecc", 0, 0), ("xid", None, 31)]
    assert all(line["iteration"] == 17 and line["node"] == "node-3" for line in events)
    assert watched.samples()[-1]["xid_events"] == 4
    assert watched.warnings == [
        "kvshift_megatron: node-3: GPU 1 reports XID 79",
        "kvshift_megatron: node-3: GPU 0 reports a double-bit ECC error",
        "kvshift_megatron: node-3: an unknown GPU reports XID 31",
    ]
    assert watched.nvml.registered == [(0, 0xA), (1, 0xA)]


@pytest.mark.parametrize("call", ["nvmlEventSetCreate", "nvmlEventSetWait_v2"])
def test_sampling_goes_on_without_events(call):
    with Watched(**{call: fake.NVML_ERROR_NOT_SUPPORTED}) as watched:
        watched.next_sample()
        watched.next_sample()
    assert len(watched.warnings) == 1 and "XID errors are not seen" in watched.warnings[0]


def test_an_unforeseen_error_ends_telemetry_and_nothing_else():
    with Watched() as watched:
        watched.next_sample()
        watched.gpus[0].milliwatts = None  # NVML never returns this
        watched.wait(lambda: watched.warnings)
    assert "GPU telemetry has stopped: TypeError" in watched.warnings[0]
    assert len(watched.warnings) == 1


def test_what_is_written_is_json(tmp_path):
    path = tmp_path / "telemetry.jsonl"
    with Watched() as watched:
        watched.next_sample()
    lines = JsonLines(path)
    for line in watched.lines:
        lines.append(line)
    assert list(read_lines(path)) == json.loads(json.dumps(watched.lines))


def test_the_stand_in_has_the_names_and_values_of_the_real_module():
    """nvidia-ml-py itself, which imports without a driver."""
    import pynvml

    stand_in = fake_nvml([])
    # Newer functions with an older one to fall back on; nvidia-ml-py 12.535 has only the latter.
    newer = {"nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons"}
    for name in fake.names_used():
        if name in newer and not hasattr(pynvml, name):
            continue
        assert hasattr(pynvml, name), name
        value = getattr(stand_in, name)
        if isinstance(value, int):
            assert getattr(pynvml, name) == value, name
        elif name != "NVMLError":
            ours = getattr(pynvml, name)
            assert callable(ours), name
    wanted = {"nvmlDeviceGetTotalEccErrors": 3, "nvmlEventSetWait_v2": 2,
              "nvmlDeviceRegisterEvents": 3, "nvmlDeviceGetTemperature": 2}  # fmt: skip
    for name, count in wanted.items():
        assert len(inspect.signature(getattr(pynvml, name)).parameters) == count, name
    assert issubclass(type(pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)), pynvml.NVMLError)
    assert pynvml.NVMLError(10).value == 10
    assert {f for f, _ in pynvml.c_nvmlEventData_t._fields_} >= {"device", "eventType", "eventData"}
    for bit, name in CLOCK_REASONS.items():
        word = "".join(part.capitalize() for part in name.split("_"))
        families = [f"nvmlClocksEventReason{word}", f"nvmlClocksThrottleReason{word}"]
        found = [getattr(pynvml, family, None) for family in families]
        # Drivers set newer bits too, which nvidia-ml-py 12.535 has no names for.
        assert bit in found or (bit > 0x100 and found == [None, None]), name
