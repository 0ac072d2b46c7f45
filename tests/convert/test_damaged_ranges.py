"""What a safetensors file or a checkpoint may say about its bytes, and casts that overflow."""

import json
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from kvshift_megatron.checks.integrity import write_manifest
from kvshift_megatron.convert import command_line
from kvshift_megatron.convert.casts import Casts
from kvshift_megatron.convert.formats.safetensors_header import read_header
from kvshift_megatron.convert.formats.torch_dist import TorchDistReader
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.convert import models
from tests.convert.test_bad_input import refused
from tests.convert.test_round_trips import random_folder


def write(file, header, data_bytes):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data_bytes))


def ranges(*pairs):
    return {
        f"t{i}": {"dtype": "F16", "shape": [(end - start) // 2], "data_offsets": [start, end]}
        for i, (start, end) in enumerate(pairs)
    }


def accepted_by_the_library(file):
    try:
        with safe_open(file, "pt") as opened:
            list(opened.keys())
    except SafetensorError:
        return False
    return True


def accepted(file):
    try:
        read_header(file)
    except ValueError as error:
        assert str(file) in str(error)
        return False
    return True


CASES = {
    "in order": (ranges((0, 8), (8, 16)), 16, True),
    "not in order": (ranges((8, 16), (0, 8)), 16, True),
    "an empty tensor": (ranges((0, 8), (8, 8), (8, 16)), 16, True),
    "nothing": ({}, 0, True),
    "twice the same bytes": (ranges((0, 8), (0, 8)), 8, False),
    "overlap": (ranges((0, 8), (4, 12)), 12, False),
    "one inside another": (ranges((0, 16), (4, 8)), 16, False),
    "a hole": (ranges((0, 8), (12, 16)), 16, False),
    "a hole at the beginning": (ranges((8, 16)), 16, False),
    "bytes left over": (ranges((0, 8)), 16, False),
    "beyond the end": (ranges((0, 8), (8, 16)), 12, False),
    "backwards": ({"t": {"dtype": "F16", "shape": [4], "data_offsets": [8, 0]}}, 8, False),
    "negative": ({"t": {"dtype": "F16", "shape": [-4], "data_offsets": [0, -8]}}, 8, False),
    "a fraction": ({"t": {"dtype": "F16", "shape": [4.0], "data_offsets": [0, 8]}}, 8, False),
    "true": ({"t": {"dtype": "F16", "shape": [True, 4], "data_offsets": [0, 8]}}, 8, False),
    "a string": ({"t": {"dtype": "F16", "shape": "4", "data_offsets": [0, 8]}}, 8, False),
    "three offsets": ({"t": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8, 8]}}, 8, False),
    "no fields": ({"t": []}, 0, False),
    "a list": ([1], 0, False),
    "a name twice": (
        b'{"t":{"dtype":"F16","shape":[4],"data_offsets":[0,8]},'
        b'"t":{"dtype":"F16","shape":[4],"data_offsets":[8,16]}}',
        16,
        False,
    ),
    "too deep": (b'{"t":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, False),
}


@pytest.mark.parametrize("case", CASES)
def test_ranges_that_the_public_library_refuses_are_refused(case, tmp_path):
    header, size, expected = CASES[case]
    write(tmp_path / "x", header, size)
    assert accepted_by_the_library(tmp_path / "x") is expected
    assert accepted(tmp_path / "x") is expected


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=4),
    size=st.integers(0, 8),
)
def test_any_ranges_are_judged_as_by_the_public_library(tmp_path_factory, pairs, size):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    write(file, ranges(*((2 * start, 2 * (start + length)) for start, length in pairs)), 2 * size)
    assert accepted(file) is accepted_by_the_library(file)


@pytest.fixture
def folder(tmp_path):
    random_folder(tmp_path / "hf", models.architecture())
    return tmp_path / "hf"


def test_two_tensors_on_the_same_bytes_are_not_converted(folder, capsys):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    write(file, header, content[8 + length :])
    refused(capsys, "hf-to-megatron", folder, "model.safetensors has a damaged header", names[1])


def test_shards_of_a_checkpoint_that_overlap_are_refused(folder, capsys):
    """Their elements add up, so that only their places show that a part is missing."""
    hf_to_megatron(ToMegatron(folder, folder.parent / "megatron"))
    file = folder.parent / "megatron" / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    entry = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    half = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([entry.size[0] // 2, entry.size[1]]))
    entry.chunks = [half, half]
    file.write_bytes(pickle.dumps(metadata))
    write_manifest(file.parent)
    parts = ("shards of embedding.word_embeddings.weight overlap", "copy it again")
    # Whoever wrote it may have written matching hashes too.
    flags = ["--no-verify-integrity"]
    refused(capsys, "megatron-to-hf", folder.parent / "megatron", *parts, flags=flags)


def test_every_torch_dtype_is_a_hugging_face_dtype(folder, capsys):
    hf_to_megatron(ToMegatron(folder, folder.parent / "megatron"))
    file = folder.parent / "megatron" / "release" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["output_layer.weight"].properties.dtype = torch.int64
    file.write_bytes(pickle.dumps(metadata))
    parts = ("'output_layer.weight' has dtype torch.int64",)
    refused(capsys, "megatron-to-hf", folder.parent / "megatron", *parts)


# Values per dtype that it holds, and that it does not.
FITS = {torch.float16: [65504.0, -65519.0], torch.bfloat16: [3.38e38], torch.float32: [3.4e38]}
TOO_LARGE = {torch.float16: [65520.0, -7e4], torch.bfloat16: [3.4e38], torch.float32: [-1e39]}


@pytest.mark.parametrize("dtype", FITS, ids=str)
def test_overflows_are_counted_exactly(dtype):
    given = [0.0, 1.0, *FITS[dtype], *TOO_LARGE[dtype], float("inf"), float("-inf"), float("nan")]
    casts = Casts()
    tensor = torch.tensor(given, dtype=torch.float64)
    assert torch.equal(casts.cast("good", tensor[:2], dtype), tensor[:2].to(dtype))
    # What was infinite or not a number before has not overflowed.
    casts.cast("odd", tensor[-3:], dtype)
    assert casts.sentence() is None
    casts.cast("bad", tensor, dtype)
    casts.cast("bad", tensor, dtype)  # the same tensor, read for --verify
    casts.cast("worse", tensor.expand(3, -1), dtype)
    number = 4 * len(TOO_LARGE[dtype])
    assert f"infinity: {number}, in tensors: 2, the first of them bad" in casts.sentence()
    assert Casts().cast("wider", tensor, torch.float64) is tensor


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "keep"])
def test_overflows_are_said(folder, capsys, dtype):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name].flatten()[:3] = torch.tensor([7e4, -1e38, 3.4e38])
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, file)
    lost = {"fp16": ": 4, in tensors: 2", "bf16": ": 1, in tensors: 1", "keep": None}[dtype]

    def convert(command, source, target):
        flags = ["--dtype", dtype]
        assert command_line.main([command, str(source), str(target), *flags]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(said) == (lost is not None), said
        assert not said or (lost in said[0] and f"of {dtype[:2]}" in said[0].replace("float", "fp"))

    root = folder.parent
    convert("hf-to-megatron", folder, root / "cast")
    assert command_line.main(["hf-to-megatron", str(folder), str(root / "kept")]) == 0
    assert "warning" not in capsys.readouterr().err
    convert("megatron-to-hf", root / "kept", root / "back")
    expected = {torch.float16: 4, torch.bfloat16: 1, torch.float32: 0}
    back = load_file(root / "back" / "model.safetensors")
    wanted = expected[back[name].dtype]
    assert sum(int(tensor.isinf().sum()) for tensor in back.values()) == wanted
    reader = TorchDistReader(root / "cast")
    read = (reader.read(reader.locate(key)) for key in reader.weights())
    assert sum(int(tensor.isinf().sum()) for tensor in read) == wanted
