"""GPU telemetry: one background thread per node samples its GPUs through NVML.

Each node appends to its own file, one JSON object per line, and depends on no other node.
Collectives would fail exactly when telemetry is needed: while a rank hangs, or after a GPU is lost.
telemetry_summary.py summarises these files for the run's writers.

    {"time": ..., "iteration": ..., "node": "node-3", "gpus": [{"gpu": 0, "power_watts": ...}, ...],
     "xid_events": 0}
    {"time": ..., "iteration": ..., "node": "node-3", "event": "xid", "gpu": 5, "code": 79}

This module needs neither Megatron nor torch.
"""

import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kvshift_megatron.training.metrics.nvml import GPU, open_gpus

_SLICE_S = 0.5  # how long the thread waits before it checks whether to stop
_MOST_EVENT_LINES = 1000  # a broken GPU can repeat an event for days


class Sampler:
    """Samples this node's GPUs until `stop`.

    Args:
        write: Takes one line's object; called from the sampling thread, must not raise.
        node: Name of the node in the lines.
        uuids: "GPU-..." of the job's GPUs in CUDA's order; None for all that NVML sees.
        interval_s: Seconds between two samples.
        iteration: Returns the training iteration for the lines.
        nvml: The module pynvml; None imports it.
        warn: Takes a sentence; None prints it on standard error.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        node: str,
        uuids: list[str] | None = None,
        interval_s: float = 10.0,
        iteration: Callable[[], int] = lambda: 0,
        nvml: ModuleType | None = None,
        warn: Callable[[str], None] | None = None,
    ):
        self._write, self._node, self._uuids = write, node, uuids
        self._interval_s, self._iteration = interval_s, iteration
        self._nvml: Any = nvml
        self._warn_line = warn or _to_stderr
        self._warned: set[str] = set()
        self._gpus: list[GPU] = []
        self._event_set: Any = None
        self._xids: dict[int | None, int] = {}
        self._reported: set[tuple] = set()
        self._event_lines = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Start sampling; return False, after one warning, if NVML or its GPUs are missing."""
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
        except ImportError as error:
            self._warn(f"no GPU telemetry: {error} (pip install nvidia-ml-py)")
            return False
        try:
            self._nvml.nvmlInit()
            self._gpus = open_gpus(self._nvml, self._uuids, self._warn)
        except (self._nvml.NVMLError, AttributeError) as error:
            self._warn(f"no GPU telemetry: NVML does not work on this node ({error})")
            return False
        if not self._gpus:
            # NVML does not treat it as an error if there is no GPU.
            if not self._warned:
                self._warn("no GPU telemetry: NVML sees no GPU on this node")
            return False
        self._open_events()
        self._thread = threading.Thread(target=self._run, name="gpu-telemetry", daemon=True)
        self._thread.start()
        return True

    def stop(self) -> None:
        """End the thread and shut NVML down; leave a thread that is stuck on a lost GPU."""
        self._stopping.set()
        if self._thread is None:
            return
        self._thread.join(timeout=4 * _SLICE_S)
        if self._thread.is_alive():
            return
        self._thread = None
        try:
            if self._event_set is not None:
                self._nvml.nvmlEventSetFree(self._event_set)
            self._nvml.nvmlShutdown()
        except self._nvml.NVMLError as error:
            self._warn(f"NVML did not shut down cleanly ({error})")

    def _run(self) -> None:
        try:
            due = time.monotonic()
            while not self._stopping.is_set():
                now = time.monotonic()
                if now >= due:
                    self._sample()
                    due = now + self._interval_s
                self._wait(min(max(due - time.monotonic(), 0.0), _SLICE_S))
        # Whatever fails in this thread, training continues without telemetry.
        except Exception as error:
            self._warn(f"GPU telemetry has stopped: {type(error).__name__}: {error}")

    def _sample(self) -> None:
        gpus = [gpu.read() for gpu in self._gpus]
        self._write({**self._heading(), "gpus": gpus, "xid_events": sum(self._xids.values())})

    def _heading(self) -> dict[str, Any]:
        return {"time": time.time(), "iteration": self._iteration(), "node": self._node}

    def _open_events(self) -> None:
        nvml = self._nvml
        # Not single-bit errors: they can be many, and ecc_corrected counts them.
        kinds = nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeDoubleBitEccError
        try:
            self._event_set = nvml.nvmlEventSetCreate()
        except nvml.NVMLError as error:
            self._warn(f"NVML reports no events, so XID errors are not seen ({error})")
            return
        for gpu in self._gpus:
            try:
                supported = nvml.nvmlDeviceGetSupportedEventTypes(gpu.handle)
                nvml.nvmlDeviceRegisterEvents(gpu.handle, kinds & supported, self._event_set)
            except nvml.NVMLError as error:
                self._warn(f"GPU {gpu.index}: its XID errors are not seen ({error})", "register")

    def _wait(self, seconds: float) -> None:
        """Wait until an event arrives or the time is up."""
        nvml = self._nvml
        if self._event_set is None:
            self._stopping.wait(seconds)
            return
        try:
            event = nvml.nvmlEventSetWait_v2(self._event_set, max(int(seconds * 1000), 1))
        except nvml.NVMLError as error:
            if error.value != nvml.NVML_ERROR_TIMEOUT:
                self._warn(f"NVML reports no more events; XID errors are not seen ({error})")
                self._event_set = None
            return
        self._report(event)

    def _report(self, event: Any) -> None:
        is_xid = bool(event.eventType & self._nvml.nvmlEventTypeXidCriticalError)
        kind = "xid" if is_xid else "double_bit_ecc"
        gpu = next((gpu.index for gpu in self._gpus if gpu.is_device(event.device)), None)
        code = int(event.eventData)
        if is_xid:
            self._xids[gpu] = self._xids.get(gpu, 0) + 1
        self._event_lines += 1
        if self._event_lines <= _MOST_EVENT_LINES:
            self._write({**self._heading(), "event": kind, "gpu": gpu, "code": code})
        if (kind, gpu, code) not in self._reported:
            self._reported.add((kind, gpu, code))
            what = f"XID {code}" if is_xid else "a double-bit ECC error"
            where = "an unknown GPU" if gpu is None else f"GPU {gpu}"
            self._warn_line(f"kvshift_megatron: {self._node}: {where} reports {what}")

    def _warn(self, sentence: str, key: str | None = None) -> None:
        """Warn once per sentence, or once per `key` if several GPUs share one."""
        if (key or sentence) not in self._warned:
            self._warned.add(key or sentence)
            self._warn_line(f"kvshift_megatron: {self._node}: {sentence}")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
