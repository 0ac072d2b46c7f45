"""What lies in a checkpoint's folder is looked at before anything of it can run."""

import os
import pickle

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from kvshift_megatron.checks.stored_files import DamagedCheckpointError, read_checkpoint


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def test_a_planted_pickle_does_not_run(checkpoint, tmp_path):
    metadata = Metadata(state_dict_metadata={}, planner_data=Planted(tmp_path / "ran"))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"it wants to load posix.mkdir.*nothing of it was run"):
        read_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()
    # With torch's own reader it would have.
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists()


def test_a_planted_pickle_is_no_damage_that_an_older_checkpoint_mends(checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with pytest.raises(ValueError) as caught:
        read_checkpoint(checkpoint)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_a_truncated_pickle_is_damage(checkpoint):
    content = pickle.dumps(Metadata(state_dict_metadata={"a": None}))
    (checkpoint / ".metadata").write_bytes(content[:-9])
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata of the checkpoint"):
        read_checkpoint(checkpoint)
