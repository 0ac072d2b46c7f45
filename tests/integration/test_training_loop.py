"""Megatron's own loop: bitwise reproducible, also across a checkpoint."""

import json

import pytest

from tests.integration.tiny_gpt import flags
from tests.support.launch import ranks, torchrun

pytestmark = pytest.mark.slow

_RANKS = 2
_TIMEOUT = 300
_MICRO_BATCHES = 2  # per step


def train(output, by_torchrun: bool = False, **overrides) -> tuple[list[str], str]:
    """Return (losses as hexadecimal floats, one per micro-batch; the run's output)."""
    words = [str(output), *flags(**overrides)]
    if by_torchrun:
        run = torchrun(_RANKS, ["tests/integration/record_losses.py", *words], _TIMEOUT)
    else:
        run = ranks(_RANKS, "tests.integration.record_losses", words, _TIMEOUT)
    assert run.returncode == 0, run.stdout[-5000:]
    return json.loads(output.read_text()), run.stdout


# Dropout is on (Megatron's default is 0.1), so that the random state must survive too.
_LAYOUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loop")
    return train(directory / "unbroken.json", by_torchrun=True, **_LAYOUT)


def test_resume_gives_the_losses_of_an_unbroken_run(unbroken, tmp_path):
    """Stop at step 10 of 20 with a checkpoint, and train the other 10 from it."""
    saved = {"save": tmp_path / "checkpoints", "save_interval": 10, "exit_interval": 10}
    first, _ = train(tmp_path / "first.json", **_LAYOUT, **saved)
    second, output = train(tmp_path / "second.json", **_LAYOUT, load=tmp_path / "checkpoints")
    assert "successfully loaded checkpoint" in output
    assert len(first) == len(second) == 10 * _MICRO_BATCHES
    # Up to the checkpoint this also compares two runs with the same seed and layout.
    assert first + second == unbroken[0]


def test_a_run_says_which_attention_it_trains(unbroken):
    line = "attention: KV shifting (free, window 2, keys and values) in layers 1-2; 16 taps"
    assert unbroken[1].count(line) == 1


def test_the_baseline_and_kv_shift_differ(unbroken, tmp_path):
    losses, output = train(tmp_path / "baseline.json", **_LAYOUT, no_kv_shift=True, train_iters=2)
    assert "attention: vanilla (SelfAttention) in layers 1-2; 0 taps" in output
    assert losses[0] != unbroken[0][0]
