"""A stand-in for pynvml (nvidia-ml-py), with the names, types and errors that its module has.

`names_used` is compared with the real module in test_telemetry.py.
"""

import ctypes
import threading
import types
from typing import Any

NVML_TEMPERATURE_GPU = 0
NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
NVML_VOLATILE_ECC = 0
NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND, NVML_ERROR_TIMEOUT = 3, 6, 10
NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND = 12, 13
NVML_ERROR_GPU_IS_LOST, NVML_ERROR_UNKNOWN = 15, 999
EVENT_DOUBLE_BIT, EVENT_XID = 0x2, 0x8

_MESSAGES = {
    NVML_ERROR_NOT_SUPPORTED: "Not Supported",
    NVML_ERROR_NOT_FOUND: "Not Found",
    NVML_ERROR_TIMEOUT: "Timeout",
    NVML_ERROR_LIBRARY_NOT_FOUND: "NVML Shared Library Not Found",
    NVML_ERROR_FUNCTION_NOT_FOUND: "Function Not Found",
    NVML_ERROR_GPU_IS_LOST: "GPU is lost",
    NVML_ERROR_UNKNOWN: "Unknown Error",
}


class NVMLError(Exception):
    def __init__(self, value: int):
        self.value = value

    def __str__(self) -> str:
        return _MESSAGES[self.value]


class _Device(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int)]


class FakeGPU:
    """What one GPU reports; tests change it."""

    def __init__(self, number: int):
        self.uuid = f"GPU-0000-{number}"
        self.name = "NVIDIA H100 80GB HBM3"
        self.utilization, self.memory_utilization = 90 + number, 40
        self.used, self.total = (10 + number) << 30, 80 << 30
        self.milliwatts = 650_000 + 1000 * number
        self.celsius = 60 + number
        self.reasons = 0
        self.ecc = {NVML_MEMORY_ERROR_TYPE_CORRECTED: 0, NVML_MEMORY_ERROR_TYPE_UNCORRECTED: 0}
        self.device = _Device(number)

    def handle(self):
        """Return a new pointer every time, as NVML does."""
        return ctypes.pointer(self.device)


def fake_nvml(gpus: list[FakeGPU]) -> types.ModuleType:
    """Return a module for these GPUs.

    Its `fail` maps a function's name to the error code that it raises, or to a function that takes
    the GPU's number and returns a code or None. `send` delivers an event. `calls` counts calls.
    """
    nvml = types.ModuleType("pynvml")
    for name in [name for name in globals() if name.startswith("NVML")]:
        setattr(nvml, name, globals()[name])
    nvml.nvmlEventTypeXidCriticalError = EVENT_XID
    nvml.nvmlEventTypeDoubleBitEccError = EVENT_DOUBLE_BIT
    nvml.fail, nvml.calls, nvml.registered = {}, {}, []
    events: list[Any] = []
    arrived = threading.Condition()

    def send(gpu: FakeGPU | None, kind: int, code: int) -> None:
        handle = gpu.handle() if gpu else ctypes.pointer(_Device(-1))
        with arrived:
            events.append(types.SimpleNamespace(device=handle, eventType=kind, eventData=code))
            arrived.notify()

    def add(name, answer):
        def call(*args):
            nvml.calls[name] = nvml.calls.get(name, 0) + 1
            code = nvml.fail.get(name)
            if callable(code):
                code = code(args[0].contents.number)
            if code is not None:
                raise NVMLError(code)
            return answer(*args)

        setattr(nvml, name, call)

    def of(answer):
        return lambda handle, *rest: answer(gpus[handle.contents.number], *rest)

    def by_uuid(uuid):
        for gpu in gpus:
            if gpu.uuid == uuid:
                return gpu.handle()
        raise NVMLError(NVML_ERROR_NOT_FOUND)

    def register(handle, kinds, event_set):
        assert event_set == "events"
        nvml.registered.append((handle.contents.number, kinds))

    def wait(event_set, milliseconds):
        assert event_set == "events" and isinstance(milliseconds, int) and milliseconds > 0
        with arrived:
            if not events:
                arrived.wait(milliseconds / 1000)
            if not events:
                raise NVMLError(NVML_ERROR_TIMEOUT)
            return events.pop(0)

    add("nvmlInit", lambda: None)
    add("nvmlShutdown", lambda: None)
    add("nvmlDeviceGetCount", lambda: len(gpus))
    add("nvmlDeviceGetHandleByIndex", lambda index: gpus[index].handle())
    add("nvmlDeviceGetHandleByUUID", by_uuid)
    add("nvmlDeviceGetUUID", of(lambda gpu: gpu.uuid))
    add("nvmlDeviceGetName", of(lambda gpu: gpu.name))
    add(
        "nvmlDeviceGetUtilizationRates",
        of(lambda gpu: types.SimpleNamespace(gpu=gpu.utilization, memory=gpu.memory_utilization)),
    )
    add(
        "nvmlDeviceGetMemoryInfo",
        of(lambda gpu: types.SimpleNamespace(used=gpu.used, total=gpu.total)),
    )
    add("nvmlDeviceGetPowerUsage", of(lambda gpu: gpu.milliwatts))
    add("nvmlDeviceGetTemperature", of(lambda gpu, sensor: gpu.celsius))
    add("nvmlDeviceGetTemperatureV", of(lambda gpu, sensor: gpu.celsius))
    add("nvmlDeviceGetCurrentClocksEventReasons", of(lambda gpu: gpu.reasons))
    add("nvmlDeviceGetCurrentClocksThrottleReasons", of(lambda gpu: gpu.reasons))
    add("nvmlDeviceGetTotalEccErrors", of(lambda gpu, kind, counter: gpu.ecc[kind]))
    add("nvmlDeviceGetSupportedEventTypes", of(lambda gpu: EVENT_XID | EVENT_DOUBLE_BIT | 0x4))
    add("nvmlEventSetCreate", lambda: "events")
    add("nvmlDeviceRegisterEvents", register)
    add("nvmlEventSetWait_v2", wait)
    add("nvmlEventSetFree", lambda event_set: None)
    nvml.send = send
    return nvml


def names_used() -> list[str]:
    """Return every name that the fake takes from pynvml."""
    return [name for name in vars(fake_nvml([])) if name.lower().startswith("nvml")]
