"""Damaged or inexpressible input: one clear sentence, exit code 1, no partial target."""

import hashlib
import json
import pickle
import resource
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvshift_megatron.checks.integrity import write_manifest
from kvshift_megatron.convert import command_line
from kvshift_megatron.convert.formats import output
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.convert import models
from tests.convert.test_round_trips import random_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    random_folder(tmp_path / "hf", models.architecture(), shards=2)
    return tmp_path / "hf"


@pytest.fixture
def checkpoint(folder):
    hf_to_megatron(ToMegatron(folder, folder.parent / "megatron"))
    return folder.parent / "megatron"


def digest(path: Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def refused(capsys, command, source, *parts, flags=()):
    """Check that a conversion fails with one sentence, writes nothing and keeps the source."""
    target, before = source.parent / "target", digest(source)
    others = set(source.parent.iterdir())
    assert command_line.main([command, str(source), str(target), *flags]) == 1
    message = capsys.readouterr().err
    lines = [line for line in message.splitlines() if not line.startswith("converted ")]
    assert len(lines) == 1 and lines[0].startswith("kvshift-convert: "), message
    for part in parts:
        assert part in message, message
    assert set(source.parent.iterdir()) == others
    assert digest(source) == before


def edit_json(file: Path, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def edit_part(folder: Path, change, part="part-0.safetensors"):
    tensors = load_file(folder / part)
    change(tensors)
    save_file(tensors, folder / part)


def test_truncated_safetensors(folder, capsys):
    file = folder / "part-1.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(capsys, "hf-to-megatron", folder, "part-1.safetensors is truncated")
    file.write_bytes(file.read_bytes()[:20])
    refused(capsys, "hf-to-megatron", folder, "part-1.safetensors is truncated")


def test_damaged_header(folder, capsys):
    file = folder / "part-1.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"{{{{"
    file.write_bytes(content)
    refused(capsys, "hf-to-megatron", folder, "part-1.safetensors has a damaged header")


def test_wrong_index(folder, capsys):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    moved = {name: "part-0.safetensors" for name in weight_map}
    edit_json(folder / INDEX, weight_map=moved)
    refused(capsys, "hf-to-megatron", folder, INDEX, "part-0.safetensors disagree about")
    edit_json(folder / INDEX, weight_map={**weight_map, "x": "part-9.safetensors"})
    refused(capsys, "hf-to-megatron", folder, "lists part-9.safetensors, but that file is missing")
    edit_json(folder / INDEX, weight_map={**weight_map, "x": "../part-0.safetensors"})
    refused(capsys, "hf-to-megatron", folder, "which is not a file in its folder")
    (folder / INDEX).write_text("{not json")
    refused(capsys, "hf-to-megatron", folder, f"{INDEX} is not valid JSON")


def test_missing_and_extra_tensors(folder, capsys):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    name = "model.layers.1.mlp.down_proj.weight"
    part = weight_map.pop(name)
    edit_json(folder / INDEX, weight_map=weight_map)
    edit_part(folder, lambda tensors: tensors.pop(name), part)
    refused(capsys, "hf-to-megatron", folder, f"lacks {name} and 0 more")
    edit_json(folder / INDEX, weight_map={**weight_map, name: part, "model.extra": part})
    both = {name: torch.zeros(32, 48), "model.extra": torch.zeros(2)}
    edit_part(folder, lambda tensors: tensors.update(both), part)
    refused(capsys, "hf-to-megatron", folder, "holds model.extra and 0 more")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"model_type": "gpt2"}, ["model_type='gpt2' cannot be", "one of kvshift_llama, "]),
        ({"num_hidden_layers": 3}, ["lacks model.layers.2."]),
        ({"num_hidden_layers": 1}, ["holds model.layers.1.", "does not call for"]),
        ({"intermediate_size": 40}, ["has the shape [48, 32], but config.json calls for [40, 32]"]),
        ({"vocab_size": 60}, ["has the shape [59, 32], but config.json calls for [60, 32]"]),
        ({"num_key_value_heads": 4}, ["but config.json calls for"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3 must divide"]),
        ({"kv_shift_window": 3}, ["lacks model.layers.0.self_attn.alpha_3"]),
        ({"kv_shift_variant": "gate"}, ["lacks model.layers.0.self_attn.alpha_logit"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight is not the embedding"]),
        ({"hidden_size": "32"}, ["hidden_size='32' must be a whole number from 1 to"]),
        ({"rms_norm_eps": ...}, ["config.json lacks rms_norm_eps"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"sliding_window": 16}, ["sliding_window=16 is below max_position_embeddings=32"]),
        ({"layer_types": ["sliding_attention"] * 2}, ["layer_types="]),
        ({"mlp_bias": True}, ["attention_bias=False with mlp_bias=True"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config="]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_parameters="]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}}, ["rope_theta=0.5"]),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            ["low_freq_factor=2.0", "--use-rope-scaling"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_disagrees_or_asks_for_too_much(folder, capsys, changes, parts):
    edit_json(folder / "config.json", **changes)
    refused(capsys, "hf-to-megatron", folder, *parts)


def test_pickled_weights_are_not_loaded(folder, capsys):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    for file in folder.glob("*safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(capsys, "hf-to-megatron", folder, "pickled weights only", "never loaded here")


def test_nothing_in_a_megatron_checkpoint_is_run(checkpoint, capsys):
    class Bomb:
        def __reduce__(self):
            return (print, ("run by a checkpoint",))

    common = checkpoint / "release" / "common.pt"
    content = torch.load(common, weights_only=False)
    torch.save({**content, "bomb": Bomb()}, common)
    refused(capsys, "megatron-to-hf", checkpoint, "common.pt cannot be read as plain data", "print")
    torch.save(content, common)
    metadata = checkpoint / "release" / ".metadata"
    metadata.write_bytes(pickle.dumps(Bomb()))
    refused(capsys, "megatron-to-hf", checkpoint, ".metadata cannot be read", "builtins.print")


def test_damaged_megatron_shards(checkpoint, capsys):
    shard = checkpoint / "release" / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refused(capsys, "megatron-to-hf", checkpoint, "is not what was saved")
    skipped = ("--no-verify-integrity",)
    refused(capsys, "megatron-to-hf", checkpoint, "truncated or damaged", flags=skipped)
    shard.unlink()
    refused(capsys, "megatron-to-hf", checkpoint, "the file __0_0.distcp of", "is missing")


def edit_arguments(checkpoint: Path, **changes):
    """Change the saved arguments, as if they had been saved so."""
    common = checkpoint / "release" / "common.pt"
    content = torch.load(common, weights_only=False)
    arguments = {**vars(content["args"]), **changes}
    content["args"] = Namespace(**{k: v for k, v in arguments.items() if v is not ...})
    torch.save(content, common)
    write_manifest(common.parent)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"num_layers": 3}, ["holds 2 layers, but its arguments say num_layers=3"]),
        ({"ffn_hidden_size": 64}, ["mlp.linear_fc1.weight has the shape [96, 32]"]),
        ({"qk_layernorm": True}, ["lacks decoder.layers.0.self_attention.q_layernorm.weight"]),
        ({"untie_embeddings_and_output_weights": False}, ["holds output_layer.weight"]),
        ({"padded_vocab_size": 256}, ["has 128 rows", "padded_vocab_size=256"]),
        ({"vocab_size": 129}, ["which is not vocab_size=129 padded", "--vocab-size"]),
        ({"normalization": "LayerNorm"}, ["normalization='LayerNorm'"]),
        ({"window_size": (4, 0)}, ["window_size=(4, 0)"]),
        ({"mtp_num_layers": 1}, ["mtp_num_layers=1"]),
        ({"multi_latent_attention": True}, ["multi_latent_attention=True"]),
        ({"rotary_base": ...}, ["lack rotary_base"]),
        ({"kv_shift_variant": ...}, ["do not say what its taps mean", "--kv-shift-variant"]),
        ({"kv_shift_variant": "gate"}, ["are not those of variant 'gate'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_disagree_or_ask_for_too_much(checkpoint, capsys, changes, parts):
    edit_arguments(checkpoint, **changes)
    refused(capsys, "megatron-to-hf", checkpoint, *parts)


def test_other_formats_and_wrong_flags(checkpoint, folder, tmp_path, capsys):
    refused(capsys, "megatron-to-hf", folder, "is not a torch_dist checkpoint")
    refused(capsys, "hf-to-megatron", checkpoint, "config.json is missing")
    flags = ["--vocab-size", "500"]
    refused(capsys, "megatron-to-hf", checkpoint, "--vocab-size 500 must be", flags=flags)
    flags = ["--tokenizer", str(checkpoint)]
    refused(capsys, "megatron-to-hf", checkpoint, "holds no tokenizer file", flags=flags)
    flags = ["--layout", "llama"]
    refused(capsys, "megatron-to-hf", checkpoint, "llama has no place for taps", flags=flags)
    flags = ["--kv-shift-window", "3"]
    message = "--kv-shift-window is for models without taps"
    refused(capsys, "hf-to-megatron", folder, message, flags=flags)
    legacy = tmp_path / "legacy"
    (legacy / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    (legacy / "latest_checkpointed_iteration.txt").write_text("3")
    refused(capsys, "megatron-to-hf", legacy, "older 'torch' format", "--ckpt-format torch_dist")
    (legacy / "latest_checkpointed_iteration.txt").write_text("4")
    refused(capsys, "megatron-to-hf", legacy, "names iter_0000004, but that folder is missing")


def test_a_target_is_replaced_only_when_asked_and_only_at_the_end(checkpoint, folder, capsys):
    target = folder.parent / "target"
    target.mkdir()
    (target / "precious").write_text("old")
    arguments = ["megatron-to-hf", str(checkpoint), str(target)]
    assert command_line.main(arguments) == 1
    assert "exists: add --overwrite" in capsys.readouterr().err
    edit_arguments(checkpoint, ffn_hidden_size=64)
    assert command_line.main([*arguments, "--overwrite"]) == 1
    assert (target / "precious").read_text() == "old"
    edit_arguments(checkpoint, ffn_hidden_size=48)
    assert command_line.main([*arguments, "--overwrite"]) == 0
    assert (target / "config.json").is_file() and not (target / "precious").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["hf", "megatron", "target"]
    capsys.readouterr()
    for place in (checkpoint, checkpoint.parent):
        assert command_line.main(["megatron-to-hf", str(checkpoint), str(place)]) == 1
        assert "cannot be the output because it" in capsys.readouterr().err


def test_a_full_disk_is_noticed_before_writing(folder, capsys, monkeypatch):
    usage = output.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    refused(capsys, "hf-to-megatron", folder, "its disk has only 0.0 GB left")


@pytest.fixture
def file_limit():
    """Limit the size of a file in place of the disk: writing fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_a_disk_that_fills_up_while_writing(checkpoint, folder, command, capsys, file_limit):
    source = checkpoint if command == "megatron-to-hf" else folder
    for size in range(100, 60_000, 3_700):
        file_limit(size)
        refused(capsys, command, source, "File too large; nothing was written", "target'")
