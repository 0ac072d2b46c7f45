"""Summarise the nodes' telemetry in a few numbers, for the writers of the run.

A thread of the writing rank reads what the nodes have appended to their files since it last looked,
so that the training loop only picks up a finished dictionary. The files have to be on a file system
that the writing rank sees, as checkpoints are; gpu/nodes_silent counts nodes whose file it does not
see.
"""

import glob
import json
import threading
import time
from pathlib import Path
from typing import Any

from kvshift_megatron.training.metrics.nvml import THROTTLING

_SPREAD = ("utilization_percent", "memory_used_bytes", "power_watts", "temperature_celsius")
_SUMS = ("ecc_corrected", "ecc_uncorrected")
_MOST_ERRORS = 8  # named in one line
_HEAD_START_S = 30.0
_TAIL_BYTES = 1 << 18  # to read of a file that already exists; more than a node writes in 30 s


class TelemetrySummary:
    """Follows the telemetry files of a run.

    Args:
        metrics: The metrics file to which the telemetry files belong.
        nodes: How many nodes there should be.
        interval_s: Of the samplers. A node counts as silent after three of them and after a minute.
    """

    def __init__(self, metrics: Path, nodes: int, interval_s: float):
        self._pattern = str(telemetry_file(Path(glob.escape(str(metrics))), "*"))
        self._nodes, self._interval_s = nodes, interval_s
        # Ignore what earlier attempts of the run left. Samplers may have started before this rank
        # got here, and clocks differ, hence the head start.
        self._since = time.time() - _HEAD_START_S
        self._read = {
            path: max(Path(path).stat().st_size - _TAIL_BYTES, 0)
            for path in glob.glob(self._pattern)
        }
        self._latest: dict[str, tuple[float, dict[str, Any]]] = {}
        self._errors: list[str] = []
        self._values: dict[str, Any] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry-summary", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def values(self) -> dict[str, Any]:
        """Return the latest summary, see `summarize`; empty before the first sample."""
        return self._values

    def update(self) -> None:
        """Read what is new and summarise it."""
        for path in glob.glob(self._pattern):
            try:
                self._follow(path)
            except OSError:
                continue  # read next time, or the node counts as silent
        now, limit = time.monotonic(), max(3 * self._interval_s, 60.0)
        fresh = [line for seen, line in self._latest.values() if now - seen < limit]
        if self._latest:
            silent = max(self._nodes - len(fresh), 0)
            self._values = summarize(fresh) | {"gpu/nodes_silent": silent}
            if self._errors:
                self._values["gpu/errors"] = self._errors[-_MOST_ERRORS:]

    def _run(self) -> None:
        while not self._stopping.wait(min(self._interval_s, 5.0)):
            self.update()

    def _follow(self, path: str) -> None:
        with open(path, "rb") as file:
            file.seek(self._read.get(path, 0))
            data = file.read()
        # The rest of an unfinished line is read next time.
        whole = data.rpartition(b"\n")[0]
        if not whole:
            return
        self._read[path] = self._read.get(path, 0) + len(whole) + 1
        for text in whole.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line["time"] < self._since:
                continue
            if "gpus" in line:
                self._latest[line["node"]] = (time.monotonic(), line)
            elif "event" in line:
                self._errors.append(f"{line['node']}:{line['gpu']} {line['event']} {line['code']}")


def telemetry_file(metrics: Path, node: str) -> Path:
    """Return a node's file: next to the metrics file, with the node in its name."""
    return metrics.with_name(f"{metrics.name}.telemetry.{node}.jsonl")


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one dictionary from one sample per node.

    Args:
        lines: The latest sample of each node.

    Returns:
        gpu/nodes, gpu/gpus: How many are in the summary.
        gpu/power_watts_min, _mean, _max: Over all GPUs that report it; likewise
            utilization_percent, memory_used_bytes and temperature_celsius.
        gpu/throttled: Number of GPUs whose clocks are limited by power, heat or hardware.
        gpu/ecc_corrected, gpu/ecc_uncorrected, gpu/xid_events: Sums.
        gpu/hottest, gpu/least_utilized, gpu/throttled_most: Strings, "node:gpu"; the last one also
            has the reasons.
    """
    gpus = [(f"{line['node']}:{gpu['gpu']}", gpu) for line in lines for gpu in line["gpus"]]
    values: dict[str, Any] = {"gpu/nodes": len(lines), "gpu/gpus": len(gpus)}
    for name in _SPREAD:
        numbers = [gpu[name] for _, gpu in gpus if name in gpu]
        if numbers:
            values[f"gpu/{name}_min"] = min(numbers)
            values[f"gpu/{name}_mean"] = sum(numbers) / len(numbers)
            values[f"gpu/{name}_max"] = max(numbers)
    throttled = [
        (len(reasons), f"{who} {', '.join(sorted(reasons))}")
        for who, gpu in gpus
        if (reasons := THROTTLING.intersection(gpu.get("throttle", ())))
    ]
    if any("throttle" in gpu for _, gpu in gpus):
        values["gpu/throttled"] = len(throttled)
    for name in _SUMS:
        if any(name in gpu for _, gpu in gpus):
            values[f"gpu/{name}"] = sum(gpu.get(name, 0) for _, gpu in gpus)
    values["gpu/xid_events"] = sum(line.get("xid_events", 0) for line in lines)
    if throttled:
        values["gpu/throttled_most"] = max(throttled)[1]
    for tag, name, pick in (
        ("gpu/hottest", "temperature_celsius", max),
        ("gpu/least_utilized", "utilization_percent", min),
    ):
        of = {who: gpu[name] for who, gpu in gpus if name in gpu}
        if of:
            values[tag] = pick(of, key=of.__getitem__)
    return values
