"""What is added to Megatron's numbers, and which writers get it."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from kvshift_megatron.training.metrics import watcher as module
from kvshift_megatron.training.metrics.json_lines import JsonLines, read_metrics
from kvshift_megatron.training.metrics.recorders import LinesOnly, Recorder
from kvshift_megatron.training.metrics.watcher import Watcher


class WeightsAndBiases:
    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Watch 4 ranks that reach 100 of 400 TFLOP/s with 8 samples of 512 tokens."""
    monkeypatch.setattr(module, "get_current_running_global_batch_size", lambda: 8)
    args = Namespace(
        log_interval=2, tensorboard_log_interval=1, seq_length=512, world_size=4, bf16=True,
        fp16=False, gpu_peak_tflops=400.0,
    )  # fmt: skip
    recorder = Recorder(JsonLines(tmp_path / "metrics.jsonl"))
    writer, wandb = LinesOnly(recorder), WeightsAndBiases()
    watcher = Watcher(args, None, recorder, writer, wandb)

    def megatrons_log(loss_dict, total, rate, iteration, **_):
        writer.add_scalar("lm loss", 2.0, iteration)
        if iteration % 2 == 0:
            writer.add_scalar("iteration-time", 0.5, iteration)
            writer.add_scalar("throughput", 100.0, iteration)
        return "memory flag"

    def run(iterations, **named):
        log = watcher.logging(megatrons_log)
        for iteration in iterations:
            assert log({}, {}, 0.1, iteration, **named) == "memory flag"
        return read_metrics(tmp_path / "metrics.jsonl"), wandb.logged

    return SimpleNamespace(run=run, watcher=watcher)


def test_throughput_and_mfu_at_the_log_interval(watched):
    metrics, logged = watched.run([1, 2])
    ours = {"tokens-per-second": 8192.0, "tokens-per-second/gpu": 2048.0, "mfu": 0.25}
    assert metrics[2].items() >= {**ours, "lm loss": 2.0, "throughput": 100.0}.items()
    assert not ours.keys() & metrics[1].keys()
    assert logged == [(2, ours)]


def test_packed_documents_count_without_their_padding(watched):
    metrics, _ = watched.run([2], total_real_tokens_in_batch=1000)
    assert metrics[2]["tokens-per-second"] == 2000.0


def test_taps_and_gpus_go_to_every_writer_once(watched):
    watched.watcher._taps = SimpleNamespace(describe=lambda: {"taps/layer_1/alpha_1_mean": 0.5})
    values = {"gpu/power_watts_max": 650.0, "gpu/hottest": "a:0"}
    watched.watcher._summary = SimpleNamespace(values=lambda: values)
    metrics, logged = watched.run([1, 2, 3, 4])
    for iteration in (2, 4):
        assert metrics[iteration].items() >= {"taps/layer_1/alpha_1_mean": 0.5, **values}.items()
    assert not any("/" in tag for tag in metrics[3])
    assert [step for step, _ in logged] == [2, 4]
    assert logged[0][1].items() >= {"taps/layer_1/alpha_1_mean": 0.5, **values}.items()


@pytest.mark.parametrize(
    ("name", "bf16", "words"),
    [
        ("NVIDIA H100 80GB HBM3", True, "MFU against 989.4 TFLOP/s per GPU"),
        ("NVIDIA H100 80GB HBM3", False, "no MFU (give --gpu-peak-tflops)"),
        ("An unknown GPU", True, "no MFU (give --gpu-peak-tflops)"),
    ],
)
def test_mfu_needs_a_known_peak_in_the_same_precision(monkeypatch, name, bf16, words):
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda: name)
    args = Namespace(
        gpu_peak_tflops=None, bf16=bf16, fp16=False, log_interval=100, tensorboard_log_interval=1
    )
    assert words in Watcher(args, None, None).describe()
