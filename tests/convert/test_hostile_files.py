"""Files of a source that are something else, and random damage: one sentence with the file."""

import json
import pickle
import random
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.convert import models
from tests.convert.test_bad_input import INDEX, refused
from tests.convert.test_hostile_fields import run
from tests.convert.test_round_trips import random_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "hf"
    random_folder(folder, models.architecture())
    return folder


@pytest.fixture(scope="module")
def converted(source):
    hf_to_megatron(ToMegatron(source, source.parent / "megatron"))
    return source.parent / "megatron"


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", ["", "7", "[]", "{", DEEP, '{"a": ' + DEEP + "}", "\xff",
                                  '{"a": ' + "[" * 90 + "]" * 90 + "}", '{"a": 1, "a": 2}',
                                  '{"a": 1' + "0" * 5000 + "}", "\0", "{}{}"])  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_files_that_are_no_json_object(source, tmp_path, capsys, text, name):
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(text, encoding="latin-1")
    refused(capsys, "hf-to-megatron", tmp_path / "hf", name)


SHARDS = [7, None, True, [], {}, "", ".", "..", "/", "../kvshift/model.safetensors", "a\0b",
          "model.safetensors/", "\ud800", "x" * 300, "two\nlines"]  # fmt: skip


@pytest.mark.parametrize("shard", SHARDS, ids=lambda shard: repr(shard)[:20])
def test_shards_that_are_no_file_name(source, tmp_path, capsys, shard):
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(capsys, "hf-to-megatron", tmp_path / "hf", str(tmp_path / "hf"))


def valid(change):
    """Return a checkpoint's description with one part replaced."""

    def make(metadata):
        change(metadata)
        return metadata

    return make


def entry_of(metadata):
    return metadata.state_dict_metadata["output_layer.weight"]


def place_of(metadata):
    return next(iter(metadata.storage_data.values()))


DESCRIPTIONS = {
    "a number": lambda metadata: 7,
    "a table": lambda metadata: {"state_dict_metadata": {}},
    "an empty one": lambda metadata: Metadata({}, storage_data={}),
    "without places": lambda metadata: Metadata(metadata.state_dict_metadata),
    "no table": lambda metadata: Metadata([1], storage_data={}),
    "odd keys": lambda metadata: Metadata({7: entry_of(metadata)}, storage_data={}),
    "odd entries": lambda metadata: Metadata({"a": 7}, storage_data={}),
    "another size": valid(lambda metadata: setattr(entry_of(metadata), "size", [1, 2])),
    "a negative size": valid(
        lambda metadata: setattr(entry_of(metadata), "size", torch.Size([-128, 32]))
    ),
    "a huge size": valid(
        lambda metadata: setattr(entry_of(metadata), "size", torch.Size([2**40, 2**40]))
    ),
    "no chunks": valid(lambda metadata: setattr(entry_of(metadata), "chunks", None)),
    "fewer chunks": valid(lambda metadata: setattr(entry_of(metadata), "chunks", [])),
    "no properties": valid(lambda metadata: setattr(entry_of(metadata), "properties", None)),
    "a dtype": valid(lambda metadata: setattr(entry_of(metadata).properties, "dtype", "fp32")),
    "a path out": valid(
        lambda metadata: setattr(place_of(metadata), "relative_path", "../../etc/passwd")
    ),
    "a path that is none": valid(lambda metadata: setattr(place_of(metadata), "relative_path", 7)),
    "a negative place": valid(lambda metadata: setattr(place_of(metadata), "offset", -7)),
    "a word as place": valid(lambda metadata: setattr(place_of(metadata), "length", "7")),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_description_that_is_something_else(converted, tmp_path, capsys, name):
    shutil.copytree(converted, tmp_path / "megatron")
    file = tmp_path / "megatron" / "release" / ".metadata"
    file.write_bytes(pickle.dumps(DESCRIPTIONS[name](pickle.loads(file.read_bytes()))))
    source, flags = tmp_path / "megatron", ["--no-verify-integrity"]
    refused(capsys, "megatron-to-hf", source, str(file.parent), flags=flags)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_random_damage_of_a_checkpoint(converted, tmp_path, name):
    """Flip bytes and cut: an error names the folder, and nothing ends in a traceback."""
    source = tmp_path / "megatron"
    shutil.copytree(converted, source)
    file, draw = source / "release" / name, random.Random(0)
    content = file.read_bytes()
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 3, 30])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        code, said = run("megatron-to-hf", source, tmp_path / "hf", "--overwrite")
        assert code == 0 or str(source) in said, said


@pytest.mark.parametrize("content", [7, [], {"args": 7}, {"args": {"num_layers": 2}}, {}])
def test_a_common_state_that_is_something_else(converted, tmp_path, capsys, content):
    shutil.copytree(converted, tmp_path / "megatron")
    torch.save(content, tmp_path / "megatron" / "release" / "common.pt")
    source, flags = tmp_path / "megatron", ["--no-verify-integrity"]
    refused(capsys, "megatron-to-hf", source, "does not hold Megatron's arguments", flags=flags)
