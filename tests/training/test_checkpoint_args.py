"""`--use-checkpoint-args`: the entry point checks and builds what the checkpoint is of."""

import argparse

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.arguments import (
    add_baseline_arg,
    add_kv_shift_args,
    kv_shift_config_from_args,
)
from kvshift_megatron.convert.architecture import Llama3RopeScaling
from kvshift_megatron.convert.megatron_arguments import (
    architecture_from_arguments,
    arguments_from_architecture,
)
from kvshift_megatron.stored.saved_arguments import take_arguments
from kvshift_megatron.training import checkpoint_args
from kvshift_megatron.training.checkpoint_args import finished, take_the_rest
from tests.convert import models

pytestmark = pytest.mark.usefixtures("megatron_rank")

ARCHITECTURES = {
    "dense": {
        "norm_epsilon": 0.3,
        "qk_layernorm": True,
        "rope_scaling": Llama3RopeScaling(factor=4.0),
        "kv_shift": KVShiftConfig("clamp", 3, shift_values=False, init="identity"),
    },
    "biases": {"tied": True, "add_qkv_bias": True, "kv_shift": KVShiftConfig("gate")},
    "experts": {"num_experts": 4, "moe_router_topk": 3},
    "baseline": {"kv_shift": None, "norm_epsilon": 1e-6},
}


def arguments(*words):
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return add_baseline_arg(add_kv_shift_args(parser)).parse_args(words)


def taking(folder, *words):
    return arguments("--use-checkpoint-args", "--load", str(folder), *words)


@pytest.fixture
def saved(tmp_path):
    def save(**changes):
        arch = models.architecture(**changes)
        return models.save_with_megatron(models.random_model(arch), arch, tmp_path / "run"), arch

    return save


def described(args, arch):
    """Return the architecture that Megatron's arguments describe."""
    return architecture_from_arguments(
        args, arch.kv_shift, torch.float32, arch.vocab_size, arch.padded_vocab_size, "run"
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_arguments_are_those_of_the_saved_model(saved, name):
    folder, arch = saved(**ARCHITECTURES[name])
    args, found = finished(taking(folder))
    assert described(args, arch) == arch
    if arch.kv_shift is None:
        assert kv_shift_config_from_args(args) == KVShiftConfig()  # asked for; it has no taps yet
    else:
        assert kv_shift_config_from_args(args) == arch.kv_shift
    # Once Megatron has done its part, the rest is the same again.
    again = taking(folder)
    take_arguments(again, "load")
    take_the_rest(again, found)
    assert vars(again) == vars(args)


def test_megatron_alone_leaves_some(saved, monkeypatch):
    """The reason for the list: if this fails, Megatron takes them itself."""
    folder, arch = saved(**ARCHITECTURES["dense"])
    monkeypatch.setattr(checkpoint_args, "LEFT_BY_MEGATRON", ())
    args, _ = finished(taking(folder))
    alone = described(args, arch)
    assert alone.norm_epsilon != arch.norm_epsilon
    assert not alone.qk_layernorm and alone.rope_scaling is None


def test_the_parsed_arguments_do_not_change(saved):
    folder, _ = saved()
    for args in (taking(folder), arguments("--load", str(folder))):
        before = dict(vars(args))
        finished(args)
        assert vars(args) == before
    assert finished(arguments("--load", str(folder)))[1] is None


def test_load_has_the_last_word_over_pretrained(saved, tmp_path):
    folder, _ = saved(kv_shift=KVShiftConfig("clamp"))
    other = models.architecture(kv_shift=KVShiftConfig("gate"), ffn_hidden_size=64)
    base = models.save_with_megatron(models.random_model(other), other, tmp_path / "base")
    args, _ = finished(taking(folder, "--pretrained-checkpoint", str(base)))
    assert args.kv_shift_variant == "clamp"
    args, _ = finished(taking(tmp_path / "new", "--pretrained-checkpoint", str(base)))
    assert (args.kv_shift_variant, args.ffn_hidden_size) == ("gate", 64)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "use_checkpoint_args: no checkpoint is named"),
        (
            ["--load", "run", "--non-persistent-ckpt-type", "local"],
            "non_persistent_ckpt_type=local",
        ),
    ],
)
def test_what_megatron_cannot_take_is_refused(words, match):
    with pytest.raises(ValueError, match=match):
        finished(arguments("--use-checkpoint-args", *words))


@pytest.mark.parametrize("spec", [["my_specs", "spec"], ["local"]])
def test_a_checkpoint_of_another_spec_is_refused(spec):
    arch = models.architecture()
    found = arguments_from_architecture(arch, 64)
    args = taking("run")
    args.spec = found.spec = spec  # Megatron has taken it
    with pytest.raises(ValueError, match=r"was trained with --spec .*, and this entry point"):
        take_the_rest(args, found)
    args.spec = ["kvshift_megatron.layer_specs", "kv_shift_layer_spec"]
    take_the_rest(args, found)
    assert args.spec is None
