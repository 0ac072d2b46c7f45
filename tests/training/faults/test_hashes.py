"""Megatron's own save and load, with this package's hashes in place of Megatron's."""

import pytest
import torch

from kvshift_megatron.training.faults import hashes
from kvshift_megatron.upstream import faults_table, substitutions
from tests.training.faults.folders_of_steps import flip, shard


@pytest.fixture
def replaced():
    """Put the row in force for one test."""
    with substitutions.Applied(faults_table.comparison(hashes._comparing)):
        yield


def load(directory):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    weight = ShardedTensor.from_rank_offsets("decoder.weight", torch.zeros(64))
    return dist_checkpointing.load({"weight": weight}, str(directory), verify_integrity=True)


def test_megatrons_load_compares_with_ours(root, replaced):
    assert torch.equal(load(root / "iter_0000006")["weight"], torch.arange(64.0))
    flip(shard(root, 6))
    with pytest.raises(
        ValueError, match=r"^load: the content of the file __0_0.distcp of .*: copy"
    ):
        load(root / "iter_0000006")


def test_a_checkpoint_without_hashes_is_loaded(root, replaced):
    (root / "iter_0000006" / "integrity.json").unlink()
    assert torch.equal(load(root / "iter_0000006")["weight"], torch.arange(64.0))


def test_megatron_alone_refuses_it(root):
    """The reason for the row: when this fails, the row can go."""
    from megatron.core.dist_checkpointing.core import CheckpointingException

    (root / "iter_0000006" / "integrity.json").unlink()
    with pytest.raises(CheckpointingException, match="manifest not found"):
        load(root / "iter_0000006")
