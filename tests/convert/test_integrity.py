"""Damage that keeps a file's length: hashes are written by the converter and compared by it."""

import pytest
from megatron.core.dist_checkpointing import validation

from kvshift_megatron.checks.integrity import MANIFEST, difference
from kvshift_megatron.convert import command_line
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.convert import models
from tests.convert.test_round_trips import random_folder


@pytest.fixture
def checkpoint(tmp_path):
    random_folder(tmp_path / "hf", models.architecture())
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron"))
    return tmp_path / "megatron" / "release"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def convert(checkpoint, *flags):
    target = checkpoint.parent.parent / "out"
    return command_line.main(["megatron-to-hf", str(checkpoint), str(target), *flags]), target


def test_what_is_written_can_be_verified_by_megatron(checkpoint):
    assert difference(checkpoint) is None
    if hasattr(validation, "verify_integrity_manifest"):  # from 0.19 on
        validation.verify_integrity_manifest(str(checkpoint))


def test_a_flipped_bit_is_not_converted(checkpoint, capsys):
    flip(next(checkpoint.glob("*.distcp")))
    code, target = convert(checkpoint)
    message = capsys.readouterr().err
    assert code == 1 and not target.exists()
    assert "__0_0.distcp" in message and "is not what was saved" in message
    assert convert(checkpoint, "--no-verify-integrity")[0] == 0


def test_a_checkpoint_without_hashes_is_converted_with_a_note(checkpoint, capsys):
    (checkpoint / MANIFEST).unlink()
    assert convert(checkpoint)[0] == 0
    assert f"note: {checkpoint} has no {MANIFEST}" in capsys.readouterr().err
