"""Hybrid models through Megatron's own loop: the losses of the GPT model with the same layers."""

import re
from pathlib import Path

import pytest

from tests.integration.tiny_gpt import flags
from tests.support.launch import ranks
from tests.support.tolerances import FP32_REL

pytestmark = pytest.mark.slow

_TIMEOUT = 300
_EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64}
_MTP = {"mtp_num_layers": 2}
_ATTENTION = {"num_layers": None, "hybrid_layer_pattern": "*-*-"}
_DELTA_NET = {
    "num_layers": None,
    "hybrid_layer_pattern": "G-*-",
    "deterministic_mode": True,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def run(nproc: int, **overrides):
    values = {"train_iters": 5, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    # Pads the vocabulary to the same size at TP 1 and 2.
    command = flags(**values | {"make_vocab_size_divisible_by": 64} | overrides)
    # Compiling takes longer than running a few steps.
    return ranks(nproc, "kvshift_megatron.pretrain", command, _TIMEOUT, TORCHDYNAMO_DISABLE="1")


def losses(nproc: int, **overrides) -> list[float]:
    """Return the losses of a run, one per step and kind, to 7 digits."""
    done = run(nproc, **overrides)
    assert done.returncode == 0, done.stdout[-5000:]
    return [float(loss) for loss in re.findall(r" (?:lm|mtp_\d) loss: (\S+) \|", done.stdout)]


@pytest.mark.parametrize(
    ("pattern", "same"),
    [("*-*-", {}), ("*E*E", _EXPERTS), ("*-*-/*-/*-", _MTP), ("*-*-", {"no_kv_shift": True})],
    ids=["attention and MLP", "experts", "multi-token prediction", "baseline"],
)
def test_a_pattern_trains_as_the_gpt_model_of_its_layers(pattern, same):
    """Both draw the same weights and taps, in the same order."""
    gpt = losses(1, **same)
    assert len(gpt) == 5 * (1 + pattern.count("/"))
    own = {name: value for name, value in same.items() if name not in _MTP}
    hybrid = losses(1, num_layers=None, hybrid_layer_pattern=pattern, **own)
    assert hybrid == pytest.approx(gpt, rel=FP32_REL)


_SPLIT_MODEL = (
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"context_parallel_size": 2},
)
_SPLIT_BATCH = {"use_distributed_optimizer": True}


def test_two_ranks_repeat_a_single_one():
    single = losses(1, **_ATTENTION)
    for layout in (*_SPLIT_MODEL, _SPLIT_BATCH):
        assert losses(2, **_ATTENTION, **layout) == pytest.approx(single, rel=FP32_REL), layout


def test_two_ranks_repeat_a_single_ones_delta_nets(tmp_path: Path):
    """From a checkpoint: Megatron draws this layer's weights for each rank from another seed."""
    saving = {"train_iters": 5, "save": tmp_path, "save_interval": 2}
    single = losses(1, **_DELTA_NET, **saving)
    assert losses(2, **_DELTA_NET, **_SPLIT_BATCH) == pytest.approx(single, rel=FP32_REL)
    for layout in _SPLIT_MODEL:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
        found = losses(2, **_DELTA_NET, **layout, load=tmp_path, train_iters=5)
        # The second line after a resume is the mean of two steps.
        assert found[::2] == pytest.approx(single[2::2], rel=FP32_REL), layout


def test_it_trains_over_a_pipeline_whose_stages_the_pattern_names():
    """Losses cannot be compared: Megatron draws each stage's weights from another seed."""
    stages = {"pipeline_model_parallel_size": 2, "hybrid_layer_pattern": "*-|*-|*-|*-"}
    found = losses(2, num_layers=None, **stages)
    assert len(found) == 5 and found[-1] < found[0]


@pytest.mark.parametrize("distributed", [False, True])
def test_a_gpt_models_checkpoint_goes_on_as_a_hybrid_model(distributed, tmp_path: Path):
    optimizer = {}
    if distributed:
        optimizer = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
    saving = {"train_iters": 6, "lr_decay_iters": 6, "save": tmp_path, "save_interval": 3}
    unbroken = losses(1, **saving, **optimizer)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    hybrid = {"num_layers": None, "hybrid_layer_pattern": "*-*-", "load": tmp_path}
    resumed = losses(1, train_iters=6, lr_decay_iters=6, **hybrid, **optimizer)
    assert len(resumed) == 3
    # Megatron's second line after a resume is the mean of two steps.
    assert resumed[::2] == pytest.approx(unbroken[3::2], rel=FP32_REL)


@pytest.mark.parametrize(
    ("symbol", "why"),
    [
        ("M", "(M), which Megatron has only with Transformer Engine"),
        ("D", "Not supported to have both Attention and MLA/DSA in one model"),
        ("G", "(G) needs FLA's GPU kernels"),
    ],
)
def test_layers_that_need_a_gpu_are_refused_before_they_are_built(symbol, why):
    done = run(1, num_layers=None, hybrid_layer_pattern=f"*-{symbol}")
    assert done.returncode == 1
    assert why in done.stdout
