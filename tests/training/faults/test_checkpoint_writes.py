"""What one rank alone cannot write is noted, so that no other rank waits in a collective."""

import socket

import pytest
import torch

from kvshift_megatron.training.faults import checkpoint_writes

FILES = (".metadata", "metadata.json", "integrity.json")


@pytest.fixture
def installed(monkeypatch, megatron_rank):
    """Replace Megatron's functions, and restore them after the test."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing

    for owner, names in {
        FileSystemWriterAsync: (
            "prepare_local_plan",
            "finish",
            "write_preloaded_data",
            "write_preloaded_data_multithread",
        ),
        serialization: ("save_config", "save_integrity_manifest"),
        checkpointing: ("maybe_msc",),
        checkpoint_writes: ("_write_files",),
    }.items():
        for name in names:
            monkeypatch.setattr(owner, name, vars(owner)[name])
    checkpoint_writes.install()


def save(folder) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    weight = ShardedTensor.from_rank_offsets("decoder.weight", torch.arange(64.0))
    dist_checkpointing.save({"weight": weight}, str(folder), verify_integrity=True)


@pytest.mark.parametrize("file", FILES)
def test_what_one_rank_cannot_write_is_noted(installed, tmp_path, file):
    # Folders have the names of the file and of the temporary file that is renamed to it.
    (tmp_path / file).mkdir()
    (tmp_path / f"{file}.tmp").mkdir()
    with pytest.raises(Exception, match="Is a directory"):
        save(tmp_path)
    failures = []
    with checkpoint_writes.noting(failures):
        save(tmp_path)
    (failure,) = failures
    assert f"rank 0 on {socket.gethostname()} could not write {tmp_path}/{file}" in failure
    assert "Is a directory" in failure and "bytes are free there" in failure


def test_a_folder_that_cannot_be_made_is_noted(installed, tmp_path, monkeypatch):
    from torch.distributed.checkpoint import FileSystemWriter

    def full(self, plan):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "prepare_local_plan", full)
    failures = []
    with checkpoint_writes.noting(failures):
        save(tmp_path)
    assert any("No space left on device" in failure for failure in failures)
