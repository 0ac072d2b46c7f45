"""Read one GPU's metrics through NVML; a metric that fails is left out from then on."""

import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any

# NVML's "clocks event reasons", called "throttle reasons" before driver 535; the bits are the same.
# Bits and meanings are from NVML's header (nvml.h, nvmlClocksEventReasons).
CLOCK_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
# Those that nobody chose. A power cap is one: at full load it limits many GPUs.
THROTTLING = frozenset(
    {
        "sw_power_cap",
        "hw_slowdown",
        "sw_thermal_slowdown",
        "hw_thermal_slowdown",
        "hw_power_brake_slowdown",
        "board_limit",
        "reliability",
    }
)


class GPU:
    """Reads the metrics of one GPU.

    Args:
        nvml: The module pynvml (nvidia-ml-py), initialized.
        handle: NVML's, of this GPU.
        index: The GPU's number in the readings: the job's own, as CUDA counts.
        warn: Called with a sentence, once for every metric that fails.
    """

    def __init__(self, nvml: ModuleType, handle: Any, index: int, warn: Callable[[str], None]):
        self.nvml, self.handle, self.index = nvml, handle, index
        self._warn = warn
        self.uuid = self._once("uuid", nvml.nvmlDeviceGetUUID)
        self.name = self._once("name", nvml.nvmlDeviceGetName)
        self._metrics: dict[str, Callable[[], dict[str, Any]]] = {
            "utilization": self._utilization,
            "memory": self._memory,
            "power": self._power,
            "temperature": self._temperature,
            "throttle": self._throttle,
            "ecc": self._ecc,
        }

    def read(self) -> dict[str, Any]:
        """Return all metrics that work.

        Returns:
            gpu (index), uuid, and, as far as this GPU has them: utilization_percent and
            memory_utilization_percent (over NVML's sampling period, under a second),
            memory_used_bytes, memory_total_bytes, power_watts, temperature_celsius, throttle (names
            of CLOCK_REASONS), ecc_corrected and ecc_uncorrected (errors since the driver was
            loaded).
        """
        values = {"gpu": self.index, "uuid": self.uuid}
        for name, metric in list(self._metrics.items()):
            try:
                values |= metric()
            # AttributeError: this pynvml lacks the function.
            except (self.nvml.NVMLError, AttributeError) as error:
                del self._metrics[name]
                self._warn(
                    f"GPU {self.index}: NVML does not report {name} ({error}); it is left out from "
                    "now on"
                )
        return values

    def is_device(self, handle: Any) -> bool:
        """Return whether a handle is this GPU's; it works even if the GPU no longer answers."""
        return _address(handle) == _address(self.handle)

    def _once(self, what: str, call: Callable[[Any], Any]) -> str | None:
        try:
            text = call(self.handle)
        except self.nvml.NVMLError as error:
            self._warn(f"GPU {self.index}: NVML does not report its {what} ({error})")
            return None
        return text.decode() if isinstance(text, bytes) else text

    def _utilization(self) -> dict[str, Any]:
        rates = self.nvml.nvmlDeviceGetUtilizationRates(self.handle)
        return {"utilization_percent": rates.gpu, "memory_utilization_percent": rates.memory}

    def _memory(self) -> dict[str, Any]:
        memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle)
        return {"memory_used_bytes": memory.used, "memory_total_bytes": memory.total}

    def _power(self) -> dict[str, Any]:
        return {"power_watts": self.nvml.nvmlDeviceGetPowerUsage(self.handle) / 1000}

    def _temperature(self) -> dict[str, Any]:
        sensor = self.nvml.NVML_TEMPERATURE_GPU
        # The newer function came with driver 570; the older one is to be removed in CUDA 14.
        newer = getattr(self.nvml, "nvmlDeviceGetTemperatureV", None)
        if newer is not None:
            try:
                return {"temperature_celsius": newer(self.handle, sensor)}
            except self.nvml.NVMLError:
                pass
        older = self.nvml.nvmlDeviceGetTemperature
        return {"temperature_celsius": older(self.handle, sensor)}

    def _throttle(self) -> dict[str, Any]:
        newer = getattr(self.nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        try:
            if newer is None:
                raise self.nvml.NVMLError(self.nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            mask = newer(self.handle)
        except self.nvml.NVMLError:
            mask = self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.handle)
        names = [name for bit, name in CLOCK_REASONS.items() if mask & bit]
        unknown = mask & ~sum(CLOCK_REASONS)
        return {"throttle": names + ([f"{unknown:#x}"] if unknown else [])}

    def _ecc(self) -> dict[str, Any]:
        kinds = {
            "ecc_corrected": self.nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
            "ecc_uncorrected": self.nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        }
        since_load = self.nvml.NVML_VOLATILE_ECC
        count = self.nvml.nvmlDeviceGetTotalEccErrors
        return {name: count(self.handle, kind, since_load) for name, kind in kinds.items()}


def open_gpus(nvml: ModuleType, uuids: list[str] | None, warn: Callable[[str], None]) -> list[GPU]:
    """Open the GPUs to watch.

    Args:
        nvml: The module pynvml, initialized.
        uuids: "GPU-...", in CUDA's order; None for all that NVML sees.
        warn: As GPU's; also called for a GPU that cannot be opened, which is left out.
    """
    openers: list[tuple[Callable[[Any], Any], Any]]
    if uuids is None:
        openers = [(nvml.nvmlDeviceGetHandleByIndex, i) for i in range(nvml.nvmlDeviceGetCount())]
    else:
        openers = [(nvml.nvmlDeviceGetHandleByUUID, uuid) for uuid in uuids]
    gpus = []
    for index, (opener, key) in enumerate(openers):
        try:
            gpus.append(GPU(nvml, opener(key), index, warn))
        except nvml.NVMLError as error:
            warn(f"NVML cannot open GPU {index} ({key}), which is not sampled ({error})")
    return gpus


def _address(handle: Any) -> int | None:
    """Return the address in a handle: ctypes compares pointers by Python object."""
    return ctypes.cast(handle, ctypes.c_void_p).value
