"""What is asked for by name is refused at start, and all ranks take what all of them can run."""

from argparse import Namespace

import pytest
import torch

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention import implementation
from kvshift_megatron.attention.implementation import agree, check_named
from kvshift_megatron.checks.model import check_model
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from kvshift_megatron.ops import dispatch
from kvshift_megatron.ops.dispatch import VARIABLE, Shift, choose
from tests.attention.test_self_attention import build_attention
from tests.support.single_process import gpt_model, transformer_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_given_up():
    yield
    dispatch._given_up.clear()
    dispatch._choices.clear()


@pytest.mark.usefixtures("megatron_rank")
@pytest.mark.parametrize(
    ("wanted", "dtype", "said"),
    [
        ("triton", torch.float32, r"=triton: .* on the cpu device, not on a GPU.*auto or eager"),
        ("cpu", torch.float16, r"=cpu: .* does not support torch.float16.*auto or eager"),
        ("fast", torch.float32, "must be auto or one of"),
    ],
)
def test_a_layer_that_cannot_run_what_is_asked_for_is_not_built(wanted, dtype, said, monkeypatch):
    config = transformer_config(params_dtype=dtype)
    monkeypatch.setenv(VARIABLE, wanted)
    with pytest.raises(ValueError, match=f"{VARIABLE}.*{said}"):
        build_attention(KVShiftConfig(), config)
    with pytest.raises(ValueError, match=f"{VARIABLE}.*{said}"):
        check_named(True, dtype, 2)
    monkeypatch.setenv(VARIABLE, "auto")
    build_attention(KVShiftConfig(), config)


@pytest.mark.usefixtures("megatron_rank")
def test_a_forced_rotation_is_refused_when_the_layer_is_built(monkeypatch):
    config = transformer_config()
    config.apply_rope_fusion = True
    monkeypatch.setenv("KVSHIFT_ROPE", "fused")
    with pytest.raises(ValueError, match=r"KVSHIFT_ROPE=fused: .* not run in Triton here"):
        build_attention(KVShiftConfig(), config)


def test_without_a_model_a_gpu_is_not_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for a GPU"))
    for wanted in ("auto", "eager", "triton"):
        monkeypatch.setenv(VARIABLE, wanted)
        check_named(False, torch.bfloat16, 2)
    monkeypatch.setenv(VARIABLE, "cpu")
    with pytest.raises(ValueError, match=r"=cpu: .* on the cuda device, not on a CPU"):
        check_named(False, torch.bfloat16, 2)


def test_the_entry_point_checks_its_arguments(monkeypatch, megatron_rank):
    from kvshift_megatron.training import run_config

    asked = []
    monkeypatch.setattr(implementation, "check_named", lambda *args: asked.append(args))
    monkeypatch.setattr(run_config, "kv_shift_config_from_args", lambda args: args.kv_shift)
    for fp16, bf16, kv_shift in ((1, 0, KVShiftConfig(window=3)), (0, 1, KVShiftConfig())):
        run_config.check_implementation(Namespace(fp16=fp16, bf16=bf16, kv_shift=kv_shift))
    run_config.check_implementation(Namespace(fp16=0, bf16=0, kv_shift=None))
    assert asked == [(True, torch.float16, 3), (True, torch.bfloat16, 2)]


def ranks_with(monkeypatch, *others):
    """Put ranks beside this one; each is (choices, refusal)."""

    def gather(everyone, own):
        everyone[:] = [own, *(implementation._Found(*other) for other in others)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1 + len(others))


@pytest.fixture
def layer(megatron_rank):
    return build_attention(KVShiftConfig())


def test_ranks_that_can_run_the_same_do(layer, monkeypatch):
    best = choose(Shift(CPU, torch.float32))
    ranks_with(monkeypatch, ({Shift(CPU, torch.float32): tuple(best)}, None), ({}, None))
    assert agree([layer, layer]) == []
    assert choose(Shift(CPU, torch.float32)) == best


def test_what_one_rank_cannot_run_no_rank_does(layer, monkeypatch):
    assert choose(Shift(CPU, torch.float32)).name == "cpu"
    other = {Shift(CPU, torch.float32): ("eager", "no C compiler is on PATH")}
    ranks_with(monkeypatch, (other, None))
    (sentence,) = agree([layer])
    assert "on all ranks" in sentence and "rank 1" in sentence and "no C compiler" in sentence
    assert choose(Shift(CPU, torch.float32)).name == "eager"
    # Layers with another window or dtype are another question.
    assert choose(Shift(CPU, torch.float32, 3)).name == "cpu"
    # As on the rank that has no compiler: asked again, it agrees.
    ranks_with(monkeypatch, (other, None))
    assert agree([layer]) == []


def test_another_ranks_refusal_ends_this_one_too(layer, monkeypatch):
    ranks_with(monkeypatch, ({}, f"{VARIABLE}=cpu: no C compiler is on PATH"))
    with pytest.raises(ValueError, match=f"on rank 1: {VARIABLE}=cpu: no C compiler"):
        agree([layer])


def test_the_built_model_settles_it_before_the_first_step(megatron_rank, monkeypatch, capsys):
    config = transformer_config()
    model = gpt_model(config, kv_shift_layer_spec(config))
    other = {Shift(CPU, torch.float32): ("triton", None)}
    dispatch._given_up[Shift(CPU, torch.float32)] = "a test"
    dispatch._choices.clear()
    ranks_with(monkeypatch, (other, None))
    check_model([model], KVShiftConfig())
    printed = capsys.readouterr().out
    assert "plain PyTorch shifts on all ranks, as rank 0 cannot run anything else" in printed
