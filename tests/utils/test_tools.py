"""Every command that writes refuses, before it writes, an output that would change its input.

The converter's own tests are in tests/convert/test_outputs.py.
"""

import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

import kvshift_megatron
from examples.induction import config as induction_config
from examples.induction import run as induction
from examples.slurm import begin
from kvshift_megatron.planning import command_line as planner
from kvshift_megatron.recipes import recipe
from kvshift_megatron.training.metrics import add_watching_args, check_watching_args
from tests.convert.test_bad_input import digest
from tools.benchmarks import command_line as benchmarks


@pytest.fixture
def place(tmp_path, monkeypatch):
    shutil.copy(recipe.MODELS / "10m.toml", tmp_path / "10m.toml")
    shutil.copy(recipe.LAYOUTS / "cpu.toml", tmp_path / "cpu.toml")
    shutil.copy(induction_config.CONFIG_DIR / "demo.toml", tmp_path / "results.json")
    (tmp_path / "base" / "iter_0000005").mkdir(parents=True)
    (tmp_path / "link").symlink_to("base")
    for name in ("text.bin", "text.idx", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVSHIFT_PLAN_LOG", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "log", "said"),
    [
        (["--json", "10m.toml"], None, "10m.toml cannot be the output because it is the input"),
        (["--png", "./cpu.toml"], None, "cpu.toml cannot be the output because it is"),
        ([], "10m.toml", "10m.toml cannot be the output because it is"),
        (["--json", "out", "--png", "base/../out"], None, "are the same file"),
        (["--json", "out"], "out", "are the same file"),
    ],
)
def test_the_planner(place, capsys, monkeypatch, flags, log, said):
    if log:
        monkeypatch.setenv("KVSHIFT_PLAN_LOG", log)
    before = digest(place)
    assert planner.main(["10m.toml", "cpu.toml", *flags]) == 2
    assert said in capsys.readouterr().err
    assert digest(place) == before


def watching(*flags, **megatrons):
    args = add_watching_args(ArgumentParser()).parse_args(flags)
    return Namespace(**{"save": None, "tensorboard_dir": None, **vars(args), **megatrons})


@pytest.mark.parametrize(
    ("flags", "megatrons"),
    [
        (["--metrics-file", "text.bin"], {"data_path": ["0.3", "text"]}),
        (["--metrics-file", "text.idx"], {"valid_data_path": ["text"]}),
        (["--metrics-file", "tokenizer.json"], {"tokenizer_model": "tokenizer.json"}),
        (["--metrics-file", "link/metrics.jsonl"], {"pretrained_checkpoint": "base"}),
        ([], {"save": "link", "pretrained_checkpoint": "base"}),
        ([], {"save": "base/new", "pretrained_checkpoint": "link"}),
        ([], {"tensorboard_dir": "base", "pretrained_checkpoint": "base"}),
        ([], {"save": "base", "load": "base", "finetune": True}),
    ],
)
def test_metrics_and_checkpoints_of_a_run(place, flags, megatrons):
    with pytest.raises(ValueError, match="cannot be the output because it"):
        check_watching_args(watching(*flags, **megatrons))


def test_a_run_goes_on_in_its_own_folder(place):
    check_watching_args(watching(save="base", load="base", tensorboard_dir="base"))
    check_watching_args(watching(save="new", load="base", finetune=True, data_path=["text"]))
    check_watching_args(watching("--metrics-file", "base/m", load="base"))


@pytest.mark.parametrize(
    "words",
    [
        ["base/run", "13b", "64x80gb", "--", "--pretrained-checkpoint", "link"],
        ["link", "13b", "64x80gb", "--set", "pretrained-checkpoint=base", "--"],
        ["text.bin", "13b", "64x80gb", "--", "--data-path", "0.5", "text"],
        ["10m.toml", "10m.toml", "cpu.toml", "--"],
    ],
)
def test_the_slurm_job(place, capsys, monkeypatch, words):
    for name, value in (("JOB_ID", "7"), ("JOB_NUM_NODES", "1"), ("GPUS_ON_NODE", "8")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = digest(place)
    assert begin.main([*words, "--save-interval", "10"]) == 2
    assert "cannot be the output because it" in capsys.readouterr().err
    assert digest(place) == before


def test_the_demo(place, capsys):
    before = digest(place)
    assert induction.main(["--config", "results.json", "--output", "."]) == 2
    assert "results.json cannot be the output because it is" in capsys.readouterr().err
    assert digest(place) == before


def test_the_benchmark(place, capsys):
    folder = Path(kvshift_megatron.__file__).parent / "new"
    assert benchmarks.main(["--quick", "--output", str(folder)]) == 1
    assert "cannot be the output because it lies inside" in capsys.readouterr().err
    assert not folder.exists()
    assert benchmarks.main(["--quick", "--output", "text.bin"]) == 1
    assert "benchmark: --output: " in capsys.readouterr().err
