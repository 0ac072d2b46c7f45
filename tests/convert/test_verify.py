"""`--verify` on the command line passes a correct conversion and stops a wrong one."""

import json

import pytest
import transformers
from safetensors.torch import load_file, save_file

from kvshift_megatron.convert import command_line, from_hf_config
from kvshift_megatron.convert.transforms import SeparateQKV
from kvshift_megatron.convert.verify import edge_case_prompts, longest_window, verify
from tests.convert import models
from tests.convert.models import SMALL
from tests.convert.test_round_trips import random_folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_rank")]


@pytest.fixture
def checkpoint(tmp_path):
    arch = models.architecture()
    return models.save_with_megatron(models.random_model(arch), arch, tmp_path / "megatron")


@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp16"])
def test_a_correct_conversion_passes(checkpoint, tmp_path, capsys, dtype):
    arguments = ["megatron-to-hf", str(checkpoint), str(tmp_path / "hf"), "--verify"]
    assert command_line.main([*arguments, "--dtype", dtype]) == 0
    assert "largest difference of logits" in capsys.readouterr().out
    arguments = ["hf-to-megatron", str(tmp_path / "hf"), str(tmp_path / "back"), "--verify"]
    assert command_line.main(arguments) == 0


def test_a_wrong_conversion_leaves_no_target(checkpoint, tmp_path, capsys, monkeypatch):
    right = SeparateQKV.to_hf

    def swapped(self, tensors, architecture):
        query, key, value = right(self, tensors, architecture)
        return query, value, key

    monkeypatch.setattr(SeparateQKV, "to_hf", swapped)
    arguments = ["megatron-to-hf", str(checkpoint), str(tmp_path / "hf"), "--verify"]
    assert command_line.main(arguments) == 1
    assert "verify: the logits of" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_damaged_tap_is_seen(checkpoint, tmp_path):
    assert command_line.main(["megatron-to-hf", str(checkpoint), str(tmp_path / "hf")]) == 0
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.beta_2"] += 0.05
    save_file(tensors, file)
    with pytest.raises(ValueError, match="verify: the logits of"):
        verify(checkpoint, tmp_path / "hf")


def test_the_prompts_cover_edge_cases():
    prompts = edge_case_prompts(59, 32)
    ids = {token for prompt in prompts for token in prompt}
    assert {0, 58} <= ids and min(ids) >= 0 and max(ids) < 59
    assert {len(prompt) for prompt in prompts} >= {1, 32}
    assert any(len(set(prompt)) == 1 and len(prompt) > 1 for prompt in prompts)
    assert edge_case_prompts(1, 1)


def test_the_long_prompt_reaches_beyond_every_window(tmp_path, monkeypatch):
    """A window that the conversion misses shows only in prompts that are longer."""
    config = transformers.MistralConfig(
        **{**SMALL, "max_position_embeddings": 8192}, sliding_window=2100
    )
    hf = models.randomize(transformers.MistralForCausalLM(config))
    hf.save_pretrained(tmp_path / "hf")
    assert longest_window(tmp_path / "hf") == 2100
    assert max(map(len, edge_case_prompts(59, 8192, 2100))) > 2100
    monkeypatch.setattr(from_hf_config, "_window", lambda *_: None)
    arguments = ["hf-to-megatron", str(tmp_path / "hf"), str(tmp_path / "megatron"), "--verify"]
    with pytest.raises(ValueError, match="verify: the logits of"):
        options = command_line._parser().parse_args(arguments)
        options.convert(options)
    assert not (tmp_path / "megatron").exists()


def test_the_librarys_default_window_is_known(tmp_path):
    fields = transformers.MistralConfig(**SMALL).to_dict()
    fields.pop("sliding_window")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert longest_window(tmp_path) == 4096


def test_a_conversion_to_megatron_is_verified(tmp_path):
    random_folder(tmp_path / "hf", models.architecture(num_experts=3))
    arguments = ["hf-to-megatron", str(tmp_path / "hf"), str(tmp_path / "megatron"), "--verify"]
    assert command_line.main(arguments) == 0
