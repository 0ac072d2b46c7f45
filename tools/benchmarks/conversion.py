"""Measure kvshift-convert in both directions against copying the same files."""

import hashlib
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tools.benchmarks import timing
from tools.benchmarks.correctness import WrongResult
from tools.benchmarks.preprocessing import tokens_per_second
from tools.benchmarks.settings import ReportProgress, Settings

# About 200 MB in bf16.
_SHAPE = {
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_QUICK_SHAPE = _SHAPE | {"vocab_size": 1_000, "hidden_size": 256, "intermediate_size": 704}

DIRECTIONS = ("hf-to-megatron", "megatron-to-hf")


def measure(settings: Settings, progress: ReportProgress) -> dict:
    """Return {"bytes", "bytes_per_second": {direction or "cp": spread}, "tokens_per_second", ...}.

    The time is that of the command itself, without Python's start, with files in the page cache.
    """
    progress(0.0, "making a model")
    model, checkpoint, back = (settings.folder / name for name in ("hf", "megatron", "back"))
    _make_model(_QUICK_SHAPE if settings.quick else _SHAPE, model)
    size = _bytes_of(model)
    seconds: dict[str, list[float]] = {name: [] for name in (*DIRECTIONS, "cp")}
    rounds = 2 if settings.quick else 5
    for number in range(rounds + 1):
        progress((number + 1) / (rounds + 2), f"round {number} of {rounds}")
        took = {
            "hf-to-megatron": _convert("hf-to-megatron", model, checkpoint),
            "megatron-to-hf": _convert("megatron-to-hf", checkpoint, back),
            "cp": _copy(model, settings.folder / "copy"),
        }
        if number == 0 and _tensors(back) != _tensors(model):
            raise WrongResult("a model differs after it was converted to Megatron and back")
        if number:  # the first round only warms up: imports, page cache
            for name, value in took.items():
                seconds[name].append(value)
    return {
        "bytes": size,
        "bytes_per_second": {
            name: timing.spread(size / value for value in values)
            for name, values in seconds.items()
        },
        "tokens_per_second": timing.spread(
            tokens_per_second(settings.folder, 500 if settings.quick else 10_000)
            for _ in range(rounds)
        ),
        "not_measured": {
            "tokenizing": "it needs Megatron-LM's tools/preprocess_data.py, which no wheel of "
            "megatron-core contains, and a tokenizer's model"
        },
    }


def _make_model(shape: dict, folder: Path) -> None:
    from kvshift_megatron.hf import KVShiftLlamaConfig, KVShiftLlamaForCausalLM

    torch.manual_seed(1)
    model = KVShiftLlamaForCausalLM(KVShiftLlamaConfig(**shape, tie_word_embeddings=False))
    model.to(torch.bfloat16).save_pretrained(folder)


def _tensors(folder: Path) -> dict[str, bytes]:
    """Return the SHA-256 of every tensor's bytes, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            found[name] = hashlib.sha256(tensor.view(torch.uint8).numpy()).digest()
    return found


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _convert(direction: str, source: Path, target: Path) -> float:
    # The command imports these when it runs: done here, it does not count as conversion.
    from kvshift_megatron.convert import to_hf, to_megatron  # noqa: F401
    from kvshift_megatron.convert.command_line import main

    start = time.perf_counter()
    if main([direction, str(source), str(target), "--overwrite"]) != 0:
        raise RuntimeError(f"{direction} failed: see its own message above")
    return time.perf_counter() - start


def _copy(source: Path, target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    shutil.copytree(source, target)
    return time.perf_counter() - start
