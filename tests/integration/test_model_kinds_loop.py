"""Mixture of experts and multi-token prediction through Megatron's own loop."""

import re

import pytest

from tests.integration.tiny_gpt import flags
from tests.support.launch import ranks
from tests.support.tolerances import FP32_REL

pytestmark = pytest.mark.slow

_TIMEOUT = 300


def train(nproc: int, **overrides) -> tuple[dict[str, list[float]], str]:
    """Return ({loss: values, one per step, to 7 digits}, the run's output)."""
    values = flags(
        train_iters=5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=64,
        mtp_num_layers=1,
        # Pads the vocabulary to the same size at TP 1 and 2.
        make_vocab_size_divisible_by=64,
        **overrides,
    )
    # Compiling takes longer than running a few steps.
    run = ranks(nproc, "kvshift_megatron.pretrain", values, _TIMEOUT, TORCHDYNAMO_DISABLE="1")
    assert run.returncode == 0, run.stdout[-5000:]
    names = ("lm loss", "mtp_1 loss")
    found = {name: re.findall(rf"\| {name}: (\S+) \|", run.stdout) for name in names}
    return {name: [float(loss) for loss in losses] for name, losses in found.items()}, run.stdout


def test_experts_and_multi_token_prediction_repeat_a_single_rank():
    one, output = train(1)
    two, _ = train(2, tensor_model_parallel_size=2, sequence_parallel=True)
    for name in one:
        assert len(one[name]) == 5
        assert two[name] == pytest.approx(one[name], rel=FP32_REL)
    shift = "KV shifting (free, window 2, keys and values)"
    line = f"attention: {shift} in layers 1-2; {shift} in MTP layer 1; 24 taps"
    assert output.count(line) == 1
    vanilla, output = train(1, no_kv_shift=True)
    assert "vanilla (SelfAttention) in MTP layer 1; 0 taps" in output
    assert vanilla["mtp_1 loss"][0] != one["mtp_1 loss"][0]


def test_they_train_over_a_pipeline():
    """Losses cannot be compared: Megatron draws each stage's weights from another seed."""
    losses, output = train(2, pipeline_model_parallel_size=2)
    for values in losses.values():
        assert len(values) == 5
        assert values[-1] < values[0]
    assert "in layers 1-2;" in output and "in MTP layer 1; 24 taps" in output
