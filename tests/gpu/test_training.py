"""Megatron's own loop on one GPU, through the entry point."""

import os
import re

import pytest

from tests.integration.tiny_gpt import flags
from tests.support.launch import python_path, torchrun

_TIMEOUT = 300
# The kernel of gradient accumulation fusion is Apex's, which these tests do not need.
_NO_APEX = {"no_gradient_accumulation_fusion": True}
_TE = {"transformer_impl": "transformer_engine", "bf16": True, "hidden_size": 256, **_NO_APEX}
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_FP32_LOCAL = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    **_NO_APEX,
    "no_rope_fusion": True,
    "no_masked_softmax_fusion": True,
    **_NO_DROPOUT,
}


def train(environment=None, **overrides) -> tuple[list[float], str]:
    """Return (losses that Megatron logs, one per step, to 7 digits; the run's output)."""
    run = torchrun(
        1,
        ["-m", "kvshift_megatron.pretrain", *flags(**overrides)],
        _TIMEOUT,
        **(environment or {}),
    )
    assert run.returncode == 0, run.stdout[-5000:]
    return [float(x) for x in re.findall(r"\| lm loss: (\S+) \|", run.stdout)], run.stdout


def test_a_checkpoint_of_a_cpu_continues_with_the_losses_of_a_cpu(tmp_path):
    # Hidden: Megatron's optimizer would use Transformer Engine's kernels even on a CPU.
    (tmp_path / "transformer_engine.py").write_text("raise ImportError('hidden by this test')")
    path = os.pathsep.join((str(tmp_path), python_path()))
    cpu = {"KVSHIFT_CPU": "1", "PYTHONPATH": path}
    train(cpu, **_FP32_LOCAL, save=tmp_path, save_interval=1, exit_interval=1)
    # A CPU's checkpoint lacks the state of a GPU's generator, which is not needed without dropout.
    resumed = {**_FP32_LOCAL, "load": tmp_path, "no_load_rng": True}
    on_gpu, output = train({"NVIDIA_TF32_OVERRIDE": "0"}, **resumed)
    assert "KV shifting (free, window 2, keys and values) in layers 1-2; 16 taps" in output
    on_cpu, _ = train(cpu, **resumed)
    assert len(on_gpu) == len(on_cpu) == 19
    assert on_gpu == pytest.approx(on_cpu, rel=1e-5)
    other_steps, _ = train(cpu, **resumed, seed=4321)
    assert other_steps != pytest.approx(on_cpu, rel=1e-4)


def test_transformer_engine_trains_in_bf16_and_starts_like_the_baseline():
    losses, output = train(**_TE, **_NO_DROPOUT)
    assert "KV shifting" in output and losses[-1] < losses[0]
    # Separate: keys rotated in the pass that shifts them may differ from Megatron's in a last bit.
    separate = {"KVSHIFT_ROPE": "separate"}
    identity, _ = train(separate, **_TE, **_NO_DROPOUT, kv_shift_init="identity")
    baseline, _ = train(**_TE, **_NO_DROPOUT, no_kv_shift=True)
    assert identity[0] == baseline[0] != losses[0]
    assert identity[-1] != baseline[-1]


def test_losses_agree_whether_keys_are_rotated_in_the_shift_or_by_megatron():
    fused, _ = train({"KVSHIFT_ROPE": "fused"}, **_TE, **_NO_DROPOUT)
    separate, _ = train({"KVSHIFT_ROPE": "separate"}, **_TE, **_NO_DROPOUT)
    assert fused == pytest.approx(separate, rel=1e-2)
    assert fused[0] == pytest.approx(separate[0], rel=1e-3)


@pytest.mark.parametrize("model", ["dense", "grouped experts"])
def test_resume_continues_an_unbroken_run(model, tmp_path):
    layout = {**_TE, "use_distributed_optimizer": True}
    if model == "grouped experts":
        layout |= {"num_experts": 4, "moe_router_topk": 2, "moe_grouped_gemm": True}
        layout |= {"moe_token_dispatcher_type": "alltoall", "moe_ffn_hidden_size": 128}
    unbroken, _ = train(**layout)
    save = {"save": tmp_path, "save_interval": 10, "exit_interval": 10}
    first, _ = train(**layout, **save)
    second, output = train(**layout, load=tmp_path)
    assert "successfully loaded checkpoint" in output
    assert len(first) == len(second) == 10
    # Kernels on a GPU may sum in another order each time. After a resume Megatron's second line
    # shows the mean of two losses.
    assert first == pytest.approx(unbroken[:10], rel=2e-3)
    assert second[2:] == pytest.approx(unbroken[12:], rel=2e-3)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_gives_the_same_losses(recompute):
    extra = {"recompute_granularity": recompute}
    if recompute == "full":
        extra |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    plain, _ = train(**_TE)
    again, _ = train(**_TE, **extra)
    assert again == pytest.approx(plain, rel=2e-3)


def test_packed_documents_train():
    losses, _ = train(
        **_TE,
        dataloader_inter_document_masking=True,
        seq_length=256,
        max_position_embeddings=256,
        vocab_size=1024,
    )
    assert losses[-1] < losses[0]


def test_a_model_that_would_stay_on_the_cpu_is_refused():
    run = torchrun(
        1,
        ["-m", "kvshift_megatron.pretrain", *flags(**_TE, use_cpu_initialization=True)],
        _TIMEOUT,
    )
    assert run.returncode != 0
    assert "kvshift_megatron: use_cpu_initialization: Megatron leaves a model" in run.stdout
