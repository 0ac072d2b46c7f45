"""TensorBoard's own files and the JSON lines hold the same numbers."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from kvshift_megatron.training.metrics.json_lines import JsonLines, read_lines, read_metrics
from kvshift_megatron.training.metrics.recorders import LinesOnly, Recorder, record_scalars

_TAPS = {f"taps/layer_{number}/alpha_1_mean": number / 7 for number in range(1, 5)}


def log(writer):
    """Log as Megatron's loop does, on either kind of writer."""
    writer.add_text("lr", "0.3", global_step=0)
    for iteration in (1, 2, 3):
        for tag in ("lm loss", "grad-norm"):
            value = iteration / 3 + len(tag)
            writer.add_scalar(tag, value, iteration)
            writer.add_scalar(f"{tag} vs samples", value, 8 * iteration)
        writer.add_many({**_TAPS, "gpu/hottest": "a:0"}, iteration)
        writer.flush()
    writer.add_scalar("lm loss validation", 5.0, 3)
    writer.add_scalar("lm loss validation", 6.0, 3)
    writer.flush()


def test_both_hold_every_number_once(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    writer = SummaryWriter(log_dir=str(tmp_path))
    restore = record_scalars(writer, Recorder(lines))
    assert isinstance(writer, SummaryWriter)  # Megatron checks this before it writes timers
    log(writer)
    writer.close()
    restore()
    assert "add_scalar" not in vars(writer) and not hasattr(writer, "add_many")

    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    shown = {
        (tag.replace("_", " "), event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    held = {}
    for line in read_lines(lines.path):
        assert line.get("samples", 24) == 8 * line["iteration"]
        for tag, value in line.items():
            if tag not in ("time", "iteration", "samples", "gpu/hottest"):
                held[tag.replace("_", " "), line["iteration"]] = value
    over_samples = {key for key in shown if key[0].endswith("vs samples")}
    assert len(over_samples) == 6
    assert shown.keys() - over_samples == held.keys()
    # TensorBoard keeps fp32.
    assert {key: shown[key] for key in held} == pytest.approx(held, rel=1e-6)
    assert [e.value for e in events.Scalars("lm loss validation")] == [5.0, 6.0]
    both = [line["lm loss validation"] for line in read_lines(lines.path) if len(line) == 3]
    assert both == [5.0, 6.0]


def test_without_tensorboard_the_lines_are_the_same(tmp_path):
    found = []
    for name in ("with", "without"):
        lines = JsonLines(tmp_path / f"{name}.jsonl")
        recorder = Recorder(lines)
        if name == "with":
            writer = SummaryWriter(log_dir=str(tmp_path))
            record_scalars(writer, recorder)
        else:
            writer = LinesOnly(recorder)
        log(writer)
        writer.close()
        found.append([{**line, "time": 0} for line in read_lines(lines.path)])
    assert found[0] == found[1] and len(found[0]) == 5
    assert json.dumps(found[0][0]["lm loss"]) == repr(1 / 3 + len("lm loss"))


def test_a_full_disk_under_tensorboard_is_one_warning(tmp_path, monkeypatch):
    """The error of TensorBoard's thread is raised in the next call, whichever that is."""
    warnings = []
    lines = JsonLines(tmp_path / "metrics.jsonl")
    writer = SummaryWriter(log_dir=str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("add_summary", "close"):
        monkeypatch.setattr(writer.file_writer, name, full)
    record_scalars(writer, Recorder(lines), warnings.append)
    log(writer)
    writer.close()
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert read_metrics(lines.path)[3]["lm loss"] == 1 + len("lm loss")
