"""Which checkpoint is chosen if the latest one is damaged: the rule, file by file.

The folders are real ones: what the format's own writer leaves, then truncated, emptied or removed.
The loop itself loads such folders in test_lost_and_hung.py.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from kvshift_megatron.training.faults import fallback
from kvshift_megatron.training.faults.fallback import TRACKER, choose, fault_of
from tests.training.faults.folders_of_steps import STEPS, cut, shard, unlink_all

DAMAGES = {
    "a shard cut off": (lambda root: cut(shard(root, 6)), "bytes long and should be"),
    "a shard missing": (lambda root: shard(root, 6).unlink(), "__0_0.distcp of the checkpoint"),
    "no .metadata": (lambda root: (root / "iter_0000006/.metadata").unlink(), "has no .metadata"),
    ".metadata cut off": (lambda root: cut(root / "iter_0000006/.metadata"), "cannot be read"),
    "no metadata.json": (
        lambda root: (root / "iter_0000006/metadata.json").unlink(),
        "has no metadata.json",
    ),
    "metadata.json empty": (
        lambda root: (root / "iter_0000006/metadata.json").write_text(""),
        "cannot be read",
    ),
    "the folder missing": (lambda root: unlink_all(root / "iter_0000006"), "there is no check"),
    "the folder empty": (
        lambda root: [file.unlink() for file in (root / "iter_0000006").iterdir()],
        "has no .metadata",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_last_complete_checkpoint_before_a_damaged_one(root, name):
    damage, words = DAMAGES[name]
    damage(root)
    instead, (warning,) = choose(root)
    assert instead == 4
    for part in [words, str(root / "iter_0000006"), f"{root}/iter_0000004: 2 steps are lost"]:
        assert part in warning
    assert (root / TRACKER).read_text() == "6"


def test_several_damaged_ones_are_skipped_and_named(root):
    cut(shard(root, 6))
    shard(root, 4).unlink()
    instead, (warning,) = choose(root)
    assert instead == 2 and "4 steps are lost" in warning
    assert "iter_0000006 is" in warning and "iter_0000004 is missing" in warning


def test_a_complete_one_is_left_to_megatron(root):
    assert choose(root) == (None, [])
    (root / TRACKER).write_text("4\n")
    # Later ones: iteration 6, which the tracker file does not name, and one that is incomplete.
    (root / "iter_0000008").mkdir()
    (root / "iter_0000008" / "__0_0.distcp").write_bytes(b"half")
    assert choose(root) == (None, [])


def test_later_ones_are_never_loaded(root):
    (root / TRACKER).write_text("4")
    cut(shard(root, 4))
    assert choose(root)[0] == 2


def test_no_complete_checkpoint_is_refused(root):
    for step in STEPS:
        cut(shard(root, step))
    with pytest.raises(
        ValueError, match=r"load: .*iter_0000006 .*no checkpoint before it"
    ) as error:
        choose(root)
    assert "iter_0000002" in str(error.value) and "--load" in str(error.value)


def test_a_flipped_bit_is_seen_with_verify_integrity(root):
    content = bytearray(shard(root, 6).read_bytes())
    content[len(content) // 2] ^= 1
    shard(root, 6).write_bytes(content)
    assert choose(root) == (None, [])
    instead, (warning,) = choose(root, verify_integrity=True)
    assert instead == 4 and "__0_0.distcp of" in warning and "is not what was saved" in warning
    (root / "iter_0000004" / "integrity.json").unlink()
    assert choose(root, verify_integrity=True)[0] == 4


@pytest.mark.parametrize("content", ["", "x", "-1", "1_0", "6 4"])
def test_an_unreadable_tracker_file_is_rewritten(root, content):
    (root / TRACKER).write_text(content)
    cut(shard(root, 6))
    instead, (warning,) = choose(root)
    assert instead is None and (root / TRACKER).read_text() == "4"
    assert f"cannot be read (it holds {content!r})" in warning and "iter_0000006" in warning
    assert not list(root.glob("*.new"))


def test_a_missing_tracker_file_is_rewritten(root):
    (root / TRACKER).unlink()
    _, (warning,) = choose(root)
    assert (root / TRACKER).read_text() == "6"
    assert "is missing" in warning and "the tracker file now names 6" in warning


def test_a_first_save_that_was_interrupted_starts_from_scratch(tmp_path):
    assert choose(tmp_path / "new") == (None, [])
    assert choose(tmp_path) == (None, [])
    (tmp_path / "iter_0000002").mkdir()
    instead, (warning,) = choose(tmp_path)
    assert instead is None and "starts from scratch" in warning
    assert not (tmp_path / TRACKER).exists()


def test_an_unreadable_tracker_file_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / TRACKER).write_text("")
    with pytest.raises(ValueError, match="delete the tracker file"):
        choose(tmp_path)


def test_a_tracker_file_that_cannot_be_written_is_refused_with_what_to_write(root, monkeypatch):
    (root / TRACKER).write_text("")

    def fails(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(fallback.os, "fsync", fails)
    with pytest.raises(ValueError, match=r"Read-only file system.*write 6"):
        choose(root)
    assert (root / TRACKER).read_text() == ""
    assert not list(root.glob("*.new"))


def test_releases_are_left_to_megatron(tmp_path):
    (tmp_path / TRACKER).write_text("release")
    assert choose(tmp_path) == (None, [])


def test_the_last_complete_one_of_the_format_with_one_file_per_rank(tmp_path):
    for step in STEPS:
        file = tmp_path / f"iter_{step:07d}" / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        torch.save({"model": torch.zeros(9)}, file)
    (tmp_path / TRACKER).write_text("6")
    assert choose(tmp_path) == (None, [])
    cut(file)
    instead, (warning,) = choose(tmp_path)
    assert instead == 4 and "mp_rank_00/model_optim_rng.pt of the checkpoint" in warning


# --- the check that everything above relies on ---


def test_a_complete_checkpoint_has_no_fault_and_dcp_agrees(root):
    """Torch's own loader reads what passes and fails on what does not."""
    assert fault_of(root / "iter_0000004") is None
    dcp.load({"decoder.weight": torch.empty(64)}, checkpoint_id=root / "iter_0000004", no_dist=True)
    cut(shard(root, 4))
    assert fault_of(root / "iter_0000004") is not None
    with pytest.raises(BaseException, match=r".+"):  # CheckpointException is not an Exception
        dcp.load(
            {"decoder.weight": torch.empty(64)}, checkpoint_id=root / "iter_0000004", no_dist=True
        )
