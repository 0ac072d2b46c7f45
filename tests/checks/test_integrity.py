"""Hashes of a checkpoint's files, against Megatron's own and Python's hashlib."""

import hashlib
import json
import random

import pytest
from megatron.core.dist_checkpointing import validation

from kvshift_megatron.checks import integrity
from kvshift_megatron.checks.integrity import MANIFEST, difference, write_manifest

FILES = {".metadata": 900, "__0_0.distcp": 300_000, "__1_0.distcp": 7, "common.pt": 0}


@pytest.fixture
def folder(tmp_path):
    generator = random.Random(3)
    for name, size in FILES.items():
        (tmp_path / name).write_bytes(generator.randbytes(size))
    (tmp_path / "tokenizer").mkdir()
    return tmp_path


def test_the_file_is_megatrons_to_the_byte(folder):
    write_manifest(folder)
    ours = (folder / MANIFEST).read_bytes()
    assert validation.INTEGRITY_FNAME == MANIFEST
    validation.verify_integrity_manifest(str(folder))
    (folder / MANIFEST).unlink()
    validation.save_integrity_manifest(str(folder))
    assert (folder / MANIFEST).read_bytes() == ours
    assert difference(folder) is None


def test_every_flipped_bit_is_seen(folder):
    write_manifest(str(folder))
    assert difference(folder) is None
    expected = hashlib.sha256((folder / "__0_0.distcp").read_bytes()).hexdigest()
    assert json.loads((folder / MANIFEST).read_text())["files"]["__0_0.distcp"] == expected
    generator = random.Random(5)
    for name in (name for name, size in FILES.items() if size):
        whole = (folder / name).read_bytes()
        for _ in range(5):
            content = bytearray(whole)
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(content)
            assert f"the content of the file {name} of the checkpoint" in difference(folder)
        (folder / name).write_bytes(whole)
        assert difference(folder) is None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"algorithm": "sha256"}', b"null"),
        *(b'{"algorithm": "md5", "files": {}}', b'{"algorithm": "sha256", "files": [1]}'),
        *(b'{"algorithm": "sha256", "files": {"a": 1}}', b'{"algorithm": [], "files": {}}'),
    ],
)
def test_a_file_of_hashes_that_is_none_is_a_fault(folder, content):
    (folder / MANIFEST).write_bytes(content)
    assert f"{MANIFEST} of the checkpoint {folder} cannot be read" in difference(folder)


def test_missing_and_unlisted_files_are_faults(folder):
    write_manifest(folder)
    (folder / "__2_0.distcp").write_bytes(b"")
    assert "does not list its file __2_0.distcp" in difference(folder)
    (folder / "__2_0.distcp").unlink()
    (folder / "common.pt").unlink()
    assert difference(folder) == f"the file common.pt of the checkpoint {folder} is missing"


def test_paths_in_it_do_not_lead_out_of_the_folder(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_bytes(b"x")
    name = f"../{outside.parent.name}/secret"
    files = {name: hashlib.sha256(b"x").hexdigest()}
    (folder / MANIFEST).write_text(json.dumps({"algorithm": "sha256", "files": files}))
    for shard in folder.glob("*.distcp"):
        shard.unlink()
    assert f"the file {name} of the checkpoint" in difference(folder)


def test_a_planted_weak_hash_is_noticed(folder, monkeypatch):
    """The tests above would see hashes that leave out part of a file."""

    def first_byte(file):
        return hashlib.sha256(file.read_bytes()[:1]).hexdigest()

    monkeypatch.setattr(integrity, "_hash", first_byte)
    with pytest.raises((AssertionError, TypeError)):
        test_every_flipped_bit_is_seen(folder)
