"""The converter never writes into anything that it reads, whatever the target is called."""

import os
import shutil
from pathlib import Path

import pytest

from kvshift_megatron.convert.command_line import main
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.convert import models
from tests.convert.test_bad_input import digest, edit_arguments
from tests.convert.test_round_trips import random_folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    random_folder(root / "hf", models.architecture(), shards=2)
    (root / "hf" / "tokenizer.json").write_text("{}")
    hf_to_megatron(ToMegatron(root / "hf", root / "megatron"))
    return root


@pytest.fixture
def root(originals, tmp_path, monkeypatch):
    for name in ("hf", "megatron"):
        shutil.copytree(originals / name, tmp_path / name)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    (tmp_path / "link").symlink_to("hf")
    (tmp_path / "to-megatron").symlink_to(tmp_path / "megatron")
    os.link(tmp_path / "hf" / "config.json", tmp_path / "hard")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TO_MEGATRON = ["hf", "hf/config.json", "hf/part-0.safetensors", "hf/new", ".", "link", "link/new",
               "megatron/../hf/new", "hard", "hf/model.safetensors.index.json"]  # fmt: skip
TO_HF = ["megatron", "megatron/release", "megatron/release/__0_0.distcp", "megatron/release/new",
         "megatron/latest_checkpointed_iteration.txt", "megatron/tokenizer", "to-megatron/new",
         ".", "words", "words/new", "words/tokenizer.json"]  # fmt: skip
CASES = [("hf-to-megatron", "hf", target) for target in TO_MEGATRON]
CASES += [("megatron-to-hf", "megatron", target) for target in TO_HF]
# One iteration: its tokenizer is beside it.
CASES += [("megatron-to-hf", "megatron/release", f"megatron/{name}") for name in ("tokenizer", "")]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(("command", "source", "target"), CASES)
def test_no_target_touches_the_source(root, capsys, command, source, target, overwrite):
    before = digest(root)
    for named in (target, str(root / target), os.path.join(os.pardir, root.name, target)):
        flags = ["--tokenizer", "words"] if command == "megatron-to-hf" else []
        flags += ["--overwrite"] if overwrite else []
        assert main([command, source, named, *flags]) == 1
        said = capsys.readouterr().err
        assert "cannot be the output because it" in said and said.count("\n") == 1, said
        assert str(Path(named)) in said
        assert digest(root) == before
        assert not [path for path in root.rglob("*") if "unfinished" in path.name]


def test_a_snapshot_of_links_keeps_what_they_lead_to(root, capsys):
    """Hugging Face's cache: a folder of links to the files themselves."""
    blobs, snapshot = root / "blobs", root / "snapshot"
    (root / "hf").rename(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "blobs", path.name))
    before = digest(root)
    for target in ("blobs", "blobs/config.json"):
        assert main(["hf-to-megatron", "snapshot", target, "--overwrite"]) == 1
        assert "cannot be the output" in capsys.readouterr().err
        assert digest(root) == before
    assert main(["hf-to-megatron", "snapshot", "converted"]) == 0
    after = digest(root)
    assert {name: after[name] for name in after if "/converted/" not in name} == before


def test_the_program_itself_is_no_target(root, capsys):
    import kvshift_megatron

    package = Path(kvshift_megatron.__file__).parent
    for target in (package / "hf", package, package.parent):
        assert main(["megatron-to-hf", "megatron", str(target), "--overwrite"]) == 1
        assert "cannot be the output" in capsys.readouterr().err
    assert (package / "hf" / "modeling_kvshift.py").is_file()


def test_refresh_code_does_not_write_into_the_package(root, capsys):
    from kvshift_megatron import hf

    (root / "exported").mkdir()
    config = '{"model_type": "kvshift_llama"}'
    (root / "exported" / "config.json").write_text(config)
    package = Path(hf.__file__).parent
    (root / "exported" / "modeling_kvshift.py").symlink_to(package / "modeling_kvshift.py")
    before = digest(package)
    assert main(["refresh-code", str(root / "exported")]) == 1
    said = capsys.readouterr().err
    assert "modeling_kvshift.py cannot be the output because it lies inside" in said
    assert digest(package) == before
    assert (root / "exported" / "config.json").read_text() == config


def test_the_tokenizer_that_the_model_was_trained_with_is_no_target(root, capsys):
    shutil.rmtree(root / "megatron" / "tokenizer")
    edit_arguments(root / "megatron", tokenizer_model=str(root / "words"))
    before = digest(root)
    for target in ("words", "words/new", "words/tokenizer.json"):
        assert main(["megatron-to-hf", "megatron", target, "--overwrite"]) == 1
        assert "cannot be the output because it" in capsys.readouterr().err
        assert digest(root) == before
