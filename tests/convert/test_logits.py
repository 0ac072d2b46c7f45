"""Converted models compute what their sources compute, in Megatron and in Transformers."""

from dataclasses import replace

import pytest
import torch
import transformers

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.convert.architecture import Llama3RopeScaling
from kvshift_megatron.convert.to_hf import ToHF, megatron_to_hf
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from kvshift_megatron.convert.transforms import GateAndUp, SeparateQKV
from kvshift_megatron.convert.verify import largest_difference
from tests.convert import models

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_rank")]
TOLERANCE = 1e-5

ARCHITECTURES = {
    "grouped": {},
    "one group": {"num_query_groups": 1},
    "one group per head": {"num_query_groups": 4},
    "tied": {"tied": True},
    "window 3": {"kv_shift": KVShiftConfig(window=3, init="identity")},
    "gate": {"kv_shift": KVShiftConfig(variant="gate")},
    "clamp": {"kv_shift": KVShiftConfig(variant="clamp", init="identity")},
    "values only": {"kv_shift": KVShiftConfig(shift_keys=False)},
    "qk norm, wide heads": {"qk_layernorm": True, "kv_channels": 12},
    "qkv bias": {"add_qkv_bias": True},
    "all biases": {"add_bias_linear": True},
    "experts": {"num_experts": 4},
    "llama 3 rope": {"rope_scaling": Llama3RopeScaling(4.0)},
}


def load(folder):
    import kvshift_megatron.hf  # noqa: F401  (registers the model)

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_an_exported_megatron_model_agrees(changes, tmp_path):
    arch = models.architecture(**changes)
    model = models.random_model(arch)
    source = models.save_with_megatron(model, arch, tmp_path / "megatron")
    megatron_to_hf(ToHF(source, tmp_path / "hf"))
    theirs = models.logits_of_transformers(load(tmp_path / "hf"))
    ours = models.logits_of_megatron(model, arch)
    assert ours[0].shape == (1, arch.vocab_size)
    assert largest_difference(ours, theirs) < TOLERANCE


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
STARTING_POINTS = {
    "llama": lambda: transformers.LlamaConfig(**models.SMALL),
    "llama, biases": lambda: transformers.LlamaConfig(
        **models.SMALL, attention_bias=True, mlp_bias=True
    ),
    "llama 3": lambda: transformers.LlamaConfig(
        **models.SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "mistral": lambda: transformers.MistralConfig(**models.SMALL, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**models.SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**models.SMALL, head_dim=16),
    "mixtral": lambda: transformers.MixtralConfig(
        **models.SMALL, num_local_experts=4, sliding_window=None
    ),
}


@pytest.mark.parametrize("config", STARTING_POINTS.values(), ids=list(STARTING_POINTS))
def test_starting_from_another_model_with_identity_taps(config, tmp_path):
    hf = models.randomize(transformers.AutoModelForCausalLM.from_config(config()))
    hf.save_pretrained(tmp_path / "hf")
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron"))
    model, arch = models.load_by_map(tmp_path / "megatron")
    assert arch.kv_shift == models.FREE
    ours = models.logits_of_megatron(model, arch)
    theirs = models.logits_of_transformers(hf)
    assert largest_difference(ours, theirs) < TOLERANCE
    # Export it again, as this package's Transformers model.
    megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "again"))
    again = models.logits_of_transformers(load(tmp_path / "again"))
    assert largest_difference(again, theirs) < TOLERANCE


def test_uniform_taps_are_those_that_training_would_draw(tmp_path):
    from kvshift_megatron.convert.megatron_model import build_model

    hf = transformers.LlamaForCausalLM(STARTING_POINTS["llama"]())
    hf.save_pretrained(tmp_path / "hf")
    taps = KVShiftConfig(seed=5)
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron", kv_shift=taps))
    converted, arch = models.load_by_map(tmp_path / "megatron")
    built = build_model(replace(arch, kv_shift=taps))
    drawn = {
        name: p for name, p in built.named_parameters() if ".alpha_" in name or ".beta_" in name
    }
    assert len(drawn) == 8
    for name, parameter in drawn.items():
        assert torch.equal(converted.get_parameter(name), parameter)


def _swapped(transform, order):
    to_hf = transform.to_hf

    def swap(self, tensors, architecture):
        parts = to_hf(self, tensors, architecture)
        return tuple(parts[i] for i in order)

    return swap


@pytest.mark.parametrize(
    "transform, order", [(SeparateQKV, (0, 2, 1)), (GateAndUp, (1, 0))], ids=["k and v", "gate, up"]
)
def test_a_wrong_transform_is_noticed(transform, order, tmp_path, monkeypatch):
    arch = models.architecture()
    model = models.random_model(arch)
    source = models.save_with_megatron(model, arch, tmp_path / "megatron")
    monkeypatch.setattr(transform, "to_hf", _swapped(transform, order))
    megatron_to_hf(ToHF(source, tmp_path / "hf"))
    theirs = models.logits_of_transformers(load(tmp_path / "hf"))
    assert largest_difference(models.logits_of_megatron(model, arch), theirs) > 100 * TOLERANCE
