"""The nodes' files in one dictionary: its entries, and the effect of a node that falls silent."""

import json
import time

import pytest

from kvshift_megatron.training.metrics.json_lines import JsonLines
from kvshift_megatron.training.metrics.telemetry_summary import (
    TelemetrySummary,
    summarize,
    telemetry_file,
)


def gpu(number, **values):
    return {
        "gpu": number,
        "utilization_percent": 90 + number,
        "memory_used_bytes": 1000 * (number + 1),
        "power_watts": 600.5 + number,
        "temperature_celsius": 60 + number,
        "throttle": [],
        "ecc_corrected": 0,
        "ecc_uncorrected": 0,
        **values,
    }


def sample(node, *gpus, **values):
    return {
        "time": time.time(),
        "iteration": 5,
        "node": node,
        "gpus": list(gpus),
        "xid_events": 0,
        **values,
    }


def test_the_numbers_are_those_of_all_gpus_and_name_the_worst():
    values = summarize(
        [
            sample("a", gpu(0), gpu(1, throttle=["gpu_idle"])),
            sample(
                "b",
                gpu(0, temperature_celsius=88, throttle=["sw_power_cap", "hw_thermal_slowdown"]),
                gpu(1, utilization_percent=3, ecc_uncorrected=2, throttle=["sw_power_cap"]),
                xid_events=4,
            ),
        ]
    )
    assert values == {
        "gpu/nodes": 2,
        "gpu/gpus": 4,
        "gpu/utilization_percent_min": 3,
        "gpu/utilization_percent_mean": (90 + 91 + 90 + 3) / 4,
        "gpu/utilization_percent_max": 91,
        "gpu/memory_used_bytes_min": 1000,
        "gpu/memory_used_bytes_mean": 1500,
        "gpu/memory_used_bytes_max": 2000,
        "gpu/power_watts_min": 600.5,
        "gpu/power_watts_mean": 601.0,
        "gpu/power_watts_max": 601.5,
        "gpu/temperature_celsius_min": 60,
        "gpu/temperature_celsius_mean": (60 + 61 + 88 + 61) / 4,
        "gpu/temperature_celsius_max": 88,
        "gpu/throttled": 2,
        "gpu/throttled_most": "b:0 hw_thermal_slowdown, sw_power_cap",
        "gpu/ecc_corrected": 0,
        "gpu/ecc_uncorrected": 2,
        "gpu/xid_events": 4,
        "gpu/hottest": "b:0",
        "gpu/least_utilized": "b:1",
    }


def test_what_no_gpu_has_is_left_out_and_what_some_have_is_of_those():
    bare = {"gpu": 0}
    values = summarize([sample("a", bare), sample("b", {**bare, "power_watts": 10.0})])
    assert values == {
        "gpu/nodes": 2,
        "gpu/gpus": 2,
        "gpu/power_watts_min": 10.0,
        "gpu/power_watts_mean": 10.0,
        "gpu/power_watts_max": 10.0,
        "gpu/xid_events": 0,
    }


@pytest.fixture
def metrics(tmp_path):
    # With characters that are special in a glob pattern.
    return tmp_path / "run[1]" / "metrics.jsonl"


def append(metrics, node, line):
    JsonLines(telemetry_file(metrics, node)).append(line)


def test_files_are_followed_from_where_this_attempt_begins(metrics):
    old = time.time() - 3600
    append(metrics, "a", sample("a", gpu(0, power_watts=1.0), time=old))
    append(metrics, "gone", {"time": old, "node": "gone", "event": "xid", "gpu": 0, "code": 1})
    # Another rank's sampler may start first.
    append(metrics, "b", {"time": time.time(), "node": "b", "event": "xid", "gpu": 0, "code": 79})
    summary = TelemetrySummary(metrics, nodes=2, interval_s=10)
    summary.update()
    assert summary.values() == {}
    append(metrics, "a", sample("a", gpu(0, power_watts=2.0)))
    append(metrics, "b", sample("b", gpu(0, power_watts=4.0)))
    summary.update()
    assert summary.values()["gpu/power_watts_mean"] == 3.0
    assert summary.values()["gpu/nodes_silent"] == 0
    assert summary.values()["gpu/errors"] == ["b:0 xid 79"]
    # The newest sample of each node counts.
    append(metrics, "b", sample("b", gpu(0, power_watts=6.0)))
    summary.update()
    assert summary.values()["gpu/power_watts_mean"] == 4.0


def test_a_long_file_of_earlier_attempts_is_not_read_from_its_beginning(metrics):
    lines = JsonLines(telemetry_file(metrics, "a"))
    for _ in range(2000):
        lines.append(sample("a", gpu(0)))
    summary = TelemetrySummary(metrics, nodes=1, interval_s=10)
    (begin,) = summary._read.values()
    assert 0 < begin < lines.path.stat().st_size
    # In the middle of a line.
    summary.update()
    assert summary.values()["gpu/gpus"] == 1


def test_half_a_line_waits_for_its_other_half(metrics):
    summary = TelemetrySummary(metrics, nodes=1, interval_s=10)
    text = json.dumps(sample("a", gpu(0))) + "\n"
    file = telemetry_file(metrics, "a")
    file.parent.mkdir()
    file.write_text("torn {\n" + text[:40])
    summary.update()
    assert summary.values() == {}
    with file.open("a") as output:
        output.write(text[40:])
    summary.update()
    assert summary.values()["gpu/gpus"] == 1


def test_a_node_that_falls_silent_is_counted_and_not_averaged(metrics, monkeypatch):
    summary = TelemetrySummary(metrics, nodes=3, interval_s=10)
    append(metrics, "a", sample("a", gpu(0, power_watts=2.0)))
    append(metrics, "b", sample("b", gpu(0, power_watts=4.0)))
    summary.update()
    assert summary.values()["gpu/nodes_silent"] == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 120)
    append(metrics, "a", sample("a", gpu(0, power_watts=2.0)))
    summary.update()
    assert summary.values()["gpu/nodes_silent"] == 2
    assert summary.values()["gpu/power_watts_mean"] == 2.0


def test_no_file_is_no_error(metrics):
    summary = TelemetrySummary(metrics, nodes=1, interval_s=0.01)
    summary.start()
    time.sleep(0.05)
    summary.stop()
    assert summary.values() == {}
