"""Round trips are bitwise exact, and the public library reads and writes the same safetensors."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvshift_megatron.convert.formats.torch_dist import TorchDistReader
from kvshift_megatron.convert.name_map import expand
from kvshift_megatron.convert.to_hf import ToHF, megatron_to_hf
from kvshift_megatron.convert.to_hf_config import config_from_architecture
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.convert import models
from tests.convert.test_name_map import architectures

pytestmark = pytest.mark.slow


def random_folder(folder, arch, layout="kvshift", seed=0, shards=1):
    """Write a Hugging Face folder with the public library and random weights; return these."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for row in expand(layout, arch):
        megatron = tuple(torch.empty(name.shape(arch)) for name in row.megatron)
        for name, like in zip(row.hf, row.transform.to_hf(megatron, arch)):
            tensors[name] = torch.randn(like.shape, generator=generator).to(arch.dtype)
    config = config_from_architecture(layout, arch)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"part-{i}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def stored(folder) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder with the public library."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        assert not tensors.keys() & load_file(file).keys()
        tensors.update(load_file(file))
    return tensors


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def weights(checkpoint) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(checkpoint)
    return {key: reader.read(reader.locate(key)) for key in reader.weights()}


@settings(max_examples=8, deadline=None)
@given(
    arch=architectures(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shards=st.integers(1, 3),
    divisible_by=st.integers(1, 16),
)
def test_hugging_face_to_megatron_and_back(arch, dtype, shards, divisible_by):
    arch = models.architecture(**{**vars(arch), "dtype": dtype})
    with TemporaryDirectory() as name:
        root = Path(name)
        before = random_folder(root / "hf", arch, shards=shards)
        job = ToMegatron(root / "hf", root / "megatron", divisible_by=divisible_by)
        written = hf_to_megatron(job)
        assert written.padded_vocab_size % divisible_by == 0
        megatron_to_hf(ToHF(root / "megatron", root / "back"))
        assert equal(stored(root / "back"), before)
        assert json.loads((root / "back" / "config.json").read_text()).items() >= (
            json.loads((root / "hf" / "config.json").read_text()).items()
        )
        # Megatron -> Hugging Face -> Megatron is exact, too.
        hf_to_megatron(ToMegatron(root / "back", root / "again", divisible_by=divisible_by))
        assert equal(weights(root / "again"), weights(root / "megatron"))


def test_megatrons_own_checkpoint_there_and_back(megatron_rank, tmp_path):
    for changes in ({}, {"num_experts": 4, "qk_layernorm": True}, {"add_bias_linear": True}):
        arch = models.architecture(**changes, padded_vocab_size=59)
        model = models.random_model(arch)
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, metadata in (
            ("stacked", {}),
            ("numbered", {"non_homogeneous_layers": True}),
            ("apart", {"singleton_local_shards": True}),
        ):
            source = models.save_with_megatron(model, arch, root / name / "megatron", **metadata)
            keys = TorchDistReader(source).weights()
            assert any("layers.1." in key for key in keys) == (name != "stacked")
            assert any(key.endswith("weight_w") for key in keys) == (name == "apart")
            megatron_to_hf(ToHF(source, root / name / "hf"))
            hf_to_megatron(ToMegatron(root / name / "hf", root / name / "back", divisible_by=1))
            back, _ = models.load_by_map(root / name / "back")
            before = dict(model.named_parameters())
            assert equal(dict(back.named_parameters()), before)


def test_files_are_split_and_cast_as_asked(tmp_path):
    arch = models.architecture()
    before = random_folder(tmp_path / "hf", arch)
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron"))
    job = ToHF(tmp_path / "megatron", tmp_path / "split", dtype=torch.bfloat16, max_shard_size=8000)
    megatron_to_hf(job)
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file.name))
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in before.values())
    largest = max(2 * math.prod(t.shape) for t in before.values())
    # A file also has a header, and a row of the name map is never split.
    assert all(file.stat().st_size < 8000 + 3 * largest + 4000 for file in files)
    cast = {name: tensor.to(torch.bfloat16) for name, tensor in before.items()}
    assert equal(stored(tmp_path / "split"), cast)
    assert json.loads((tmp_path / "split" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tokenizer_files_and_token_ids_are_kept(tmp_path):
    arch = models.architecture()
    random_folder(tmp_path / "hf", arch)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    (tmp_path / "hf" / "tokenizer.json").write_text('{"known": "file"}')
    (tmp_path / "hf" / "notes.txt").write_text("not a tokenizer's")
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron"))
    megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "back"))
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"known": "file"}'
    assert not (tmp_path / "back" / "notes.txt").exists()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 7
    # --tokenizer replaces the files in the checkpoint.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.model").write_bytes(b"x")
    megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "b", tokenizer=tmp_path / "other"))
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"x"
    assert not (tmp_path / "b" / "tokenizer.json").exists()


def test_a_vanilla_model_stays_vanilla(tmp_path):
    arch = models.architecture(kv_shift=None)
    before = random_folder(tmp_path / "hf", arch, "llama")
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron", kv_shift=None))
    assert not any("alpha" in key for key in TorchDistReader(tmp_path / "megatron").weights())
    megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "back"))
    assert equal(stored(tmp_path / "back"), before)
    with pytest.raises(ValueError, match="the layout kvshift is for models with taps"):
        megatron_to_hf(ToHF(tmp_path / "megatron", tmp_path / "no", layout="kvshift"))
