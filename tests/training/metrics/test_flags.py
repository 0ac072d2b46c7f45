"""Which file the lines go to, and what is refused before anything is built."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from kvshift_megatron.training.metrics import (
    add_watching_args,
    check_watching_args,
    metrics_file,
    watch,
)
from kvshift_megatron.training.metrics.gpu_peaks import peak_tflops


def parsed(*flags, **megatrons):
    args = add_watching_args(ArgumentParser()).parse_args(flags)
    return Namespace(**{"save": None, "tensorboard_dir": None, **vars(args), **megatrons})


def test_the_lines_go_to_the_named_file_or_to_megatrons_folder():
    places = {"save": "s", "tensorboard_dir": "t"}
    assert metrics_file(parsed("--metrics-file", "m.jsonl", **places)) == Path("m.jsonl")
    assert metrics_file(parsed(**places)) == Path("t/metrics.jsonl")
    assert metrics_file(parsed(save="s")) == Path("s/metrics.jsonl")
    assert metrics_file(parsed()) is None


def test_with_nowhere_to_write_nothing_is_changed():
    args = parsed()
    before = dict(vars(args))
    with watch(args, None):
        pass
    assert vars(args) == before


def test_what_cannot_be_honoured_is_refused(tmp_path):
    check_watching_args(parsed("--metrics-file", str(tmp_path / "new")))
    for flags, words in (
        (["--metrics-file", str(tmp_path)], "is a folder: give --metrics-file a file"),
        (["--gpu-peak-tflops", "0"], "gpu_peak_tflops=0.0 must be above 0"),
        (["--gpu-peak-tflops", "nan"], "gpu_peak_tflops=nan must be above 0"),
        (["--gpu-telemetry-interval", "-1"], "gpu_telemetry_interval=-1.0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            check_watching_args(parsed(*flags))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A10", None),
        ("cpu", None),
    ],
)
def test_peaks_by_the_names_that_cuda_gives(name, tflops):
    assert peak_tflops(name) == tflops
