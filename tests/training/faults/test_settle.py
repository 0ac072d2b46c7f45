"""What a run loads is settled for all ranks, before Megatron reads its arguments."""

import json
import shutil
from argparse import Namespace

import pytest
import torch

from kvshift_megatron.checks.checkpoint_paths import TRACKER
from kvshift_megatron.checks.to_load import checkpoint_to_load
from kvshift_megatron.training.faults import agreement, settle
from kvshift_megatron.training.faults.settle import settle_checkpoint
from tests.training.faults.folders_of_steps import cut, flip, shard


def arguments(root, **others):
    values = {
        "load": str(root),
        **dict.fromkeys(("ckpt_step", "pretrained_checkpoint", "non_persistent_ckpt_type")),
        **dict.fromkeys(("non_persistent_global_ckpt_dir", "ckpt_convert_format")),
        "finetune": False,
        "exit_on_missing_checkpoint": False,
        "verify_integrity": True,
        "distributed_timeout_minutes": 1,
    }
    return Namespace(**{**values, **others})


@pytest.fixture
def argv(monkeypatch):
    words = ["pretrain"]
    monkeypatch.setattr(settle.sys, "argv", words)
    monkeypatch.setattr(agreement, "_store", torch.distributed.HashStore())
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return words


@pytest.fixture
def settled(argv, capsys):
    """Return a function that returns (what Megatron then loads, what was printed)."""

    def settled(args):
        del argv[1:]
        agreement._store = torch.distributed.HashStore()
        settle_checkpoint(args)
        step = int(argv[2]) if len(argv) == 3 else args.ckpt_step
        found = checkpoint_to_load(Namespace(**{**vars(args), "ckpt_step": step}))
        return found and found.directory, capsys.readouterr().err

    return settled


def test_megatron_gets_ckpt_step_as_from_the_user(root, argv, capsys):
    cut(shard(root, 6))
    settle_checkpoint(arguments(root))
    assert argv == ["pretrain", "--ckpt-step", "4"]
    assert "WARNING: load: the file __0_0.distcp" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("given", [{"ckpt_step": 6}, {"finetune": True}, {"load": None}])
def test_what_the_user_named_is_not_replaced_but_refused(root, argv, given, damage):
    damage(shard(root, 6))
    args = arguments(root, **given)
    if args.load is None:
        args.pretrained_checkpoint = str(root)
    with pytest.raises(
        ValueError, match=r"^load: the .*file __0_0.distcp of the checkpoint .*: copy"
    ):
        settle_checkpoint(args)
    assert argv == ["pretrain"]


def test_a_flipped_bit_is_passed_over_unless_the_user_does_not_want_to_know(root, settled):
    flip(shard(root, 6))
    loaded, said = settled(arguments(root))
    assert loaded == root / "iter_0000004" and "is not what was saved" in said
    loaded, said = settled(arguments(root, verify_integrity=False))
    assert loaded == root / "iter_0000006" and said == ""


def test_without_hashes_a_checkpoint_is_loaded_and_said_to_be(root, settled):
    (root / "iter_0000006" / "integrity.json").unlink()
    loaded, said = settled(arguments(root))
    assert loaded == root / "iter_0000006"
    assert "WARNING: load: the checkpoint" in said and "has no integrity.json" in said


def test_hashes_are_compared_once(root, settled, monkeypatch):
    from kvshift_megatron.checks import integrity

    hashed = []
    original = integrity._hash
    monkeypatch.setattr(integrity, "_hash", lambda file: hashed.append(file) or original(file))
    settled(arguments(root))
    assert len(hashed) == len(set(hashed)) > 2


# --- non-persistent checkpoints ---


@pytest.fixture
def temporary(root):
    """Add non-persistent checkpoints of steps 3, 5 and 7; 7 is the last of all."""
    folder = root / "non_persistent"
    for own, step in zip((3, 5, 7), (2, 4, 6)):
        shutil.copytree(root / f"iter_{step:07d}", folder / f"iter_{own:07d}")
    (folder / TRACKER).write_text("7")
    return folder


def of(root, **others):
    return arguments(root, non_persistent_ckpt_type="global", **others)


def test_the_last_one_counts_if_it_is_complete(root, temporary, settled):
    assert settled(of(root)) == (temporary / "iter_0000007", "")
    cut(shard(root, 6))
    # Megatron does not read the persistent one.
    assert settled(of(root)) == (temporary / "iter_0000007", "")
    assert settled(arguments(root))[0] == root / "iter_0000004"


@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.unlink()])
def test_a_damaged_last_one_is_passed_over(root, temporary, settled, damage):
    """It ended in an EOFError although a complete one was there."""
    damage(shard(temporary, 7))
    loaded, said = settled(of(root))
    assert loaded == root / "iter_0000006"
    assert "non_persistent/iter_0000007" in said and "non-persistent one is that of 5" in said
    damage(shard(root, 6))
    loaded, said = settled(of(root))
    assert loaded == temporary / "iter_0000005"


def test_all_damaged_ones_are_passed_over(root, temporary, settled):
    for step in (3, 5, 7):
        cut(shard(temporary, step))
    loaded, said = settled(of(root))
    assert loaded == root / "iter_0000006" and "no non-persistent checkpoint is complete" in said
    assert (temporary / f"{TRACKER}.damaged").read_text() == "7"


def test_it_is_loaded_if_no_persistent_one_is_complete(root, temporary, settled):
    for step in (2, 4, 6):
        cut(shard(root, step))
    (temporary / TRACKER).write_text("5")
    loaded, said = settled(of(root))
    assert loaded == temporary / "iter_0000005" and "the run loads the non-persistent one" in said


@pytest.mark.parametrize("content", [b"junk", b"\xff\xfe7\x00", b""])
def test_an_unreadable_tracker_file_of_theirs_is_corrected(root, temporary, settled, content):
    (temporary / TRACKER).write_bytes(content)
    loaded, said = settled(of(root))
    assert loaded == temporary / "iter_0000007" and "cannot be read (it holds" in said


def test_what_cannot_be_corrected_is_refused_with_what_to_do(root, temporary, argv, monkeypatch):
    cut(shard(temporary, 7))

    def fails(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(settle, "write_tracker", fails)
    with pytest.raises(ValueError, match=r"cannot be changed \(Permission denied\): remove it, or"):
        settle_checkpoint(of(root))


# --- what cannot be loaded at all ---


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"exit_on_missing_checkpoint": True}, "load: .*/new holds no checkpoint, and exit_on"),
        ({"ckpt_convert_format": "torch"}, "holds no checkpoint, and ckpt_convert_format needs"),
        ({"pretrained_checkpoint": "/none"}, "^pretrained_checkpoint: /none has no latest_check"),
        ({"non_persistent_ckpt_type": "local"}, "^non_persistent_ckpt_type=local with a check"),
        ({"load": "msc://bucket/run"}, "^load: .*not in a file system"),
        ({"load": __file__}, "^load: .* is not a folder"),
    ],
)
def test_it_is_refused_before_anything_is_built(tmp_path, argv, given, words):
    with pytest.raises(ValueError, match=words):
        settle_checkpoint(arguments(**{"root": tmp_path / "new", **given}))


# --- all ranks ---


def test_the_other_ranks_do_what_rank_0_found(root, argv, monkeypatch, capsys):
    """Even though the files that they see are complete."""
    monkeypatch.setenv("RANK", "1")
    shared = agreement._store
    shared.set("checkpoint to load", json.dumps({"result": [2, ["a warning"]]}))
    settle_checkpoint(arguments(root))
    assert argv == ["pretrain", "--ckpt-step", "2"]
    assert capsys.readouterr().err == ""


def test_the_other_ranks_refuse_with_rank_0s_message(root, argv, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    agreement._store.set("checkpoint to load", json.dumps({"error": "load: nothing is complete"}))
    with pytest.raises(ValueError, match="nothing is complete"):
        settle_checkpoint(arguments(root))
