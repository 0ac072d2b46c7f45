"""The folder of a save: empty at the start; what it replaces is kept until it is complete."""

import pytest

from kvshift_megatron.checks.checkpoint_paths import TRACKER
from kvshift_megatron.training.faults.checkpoint_folder import Folder
from kvshift_megatron.training.faults.fallback import choose, fault_of
from tests.training.faults.folders_of_steps import cut, save, shard


@pytest.fixture
def folder(root):
    return Folder(root, 6)


def test_a_new_folder_is_made_and_removed_again(root):
    folder = Folder(root / "deeper", 8)
    folder.begin()
    assert folder.path == root / "deeper" / "iter_0000008" and folder.path.is_dir()
    assert folder.latest() is None
    (folder.path / "__0_0.distcp").write_bytes(b"half")
    assert folder.give_up() == f"{folder.path} was removed."
    assert not folder.path.exists()


def test_an_incomplete_save_is_removed(root, folder):
    (folder.path / ".metadata").unlink()
    folder.begin()
    assert list(folder.path.iterdir()) == []
    assert not list(root.glob("replaced.*"))


def test_a_complete_one_is_kept_until_the_new_one_is_complete(root, folder):
    before = shard(root, 6).read_bytes()
    folder.begin()
    assert list(folder.path.iterdir()) == []
    (folder.path / "__0_0.distcp").write_bytes(b"half")
    assert folder.give_up() == f"{folder.path} was restored from before the save."
    assert fault_of(folder.path) is None and shard(root, 6).read_bytes() == before
    assert folder.latest() == 6

    folder.begin()
    folder.path.rmdir()
    save(folder.path)
    folder.complete()
    assert fault_of(folder.path) is None and not list(root.glob("replaced.*"))


def test_one_that_cannot_be_moved_aside_stays(root, folder, monkeypatch):
    def refuse(*_):
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patched:
        patched.setattr(type(folder.path), "rename", refuse)
        with pytest.raises(OSError, match="not empty"):
            folder.begin()
    assert folder.give_up() == f"{folder.path} is unchanged."
    assert fault_of(folder.path) is None


def test_megatrons_clean_up_keeps_the_last_whole_one(root, folder):
    """It keeps the latest non-persistent folder, which may be that of a save in progress."""
    from megatron.training import checkpointing

    from kvshift_megatron.training.faults.progress import Progress
    from kvshift_megatron.training.faults.saving import Save, Saves

    saves = Saves(goes_on=False, progress=Progress())
    clean = saves._clean(checkpointing.cleanup_old_non_persistent_checkpoint)
    folder.begin()  # moves a complete one aside; Megatron must not parse its new name
    saves._current = Save(8, Folder(root, 8))
    saves._current.folder.begin()
    clean(root)
    assert {path.name for path in root.glob("iter_*")} == {"iter_0000006", "iter_0000008"}
    saves._current = None
    clean(root)
    assert [path.name for path in root.glob("iter_*")] == ["iter_0000008"]


def test_after_a_kill_during_the_save_it_is_restored(root, folder):
    folder.begin()
    (folder.path / "__0_0.distcp").write_bytes(b"half")
    instead, (warning,) = choose(root)
    assert instead is None and "restores and loads the checkpoint from before" in warning
    assert fault_of(folder.path) is None and not list(root.glob("replaced.*"))


def test_two_interrupted_saves_in_a_row_do_not_lose_it(root, folder):
    folder.begin()
    (folder.path / "__0_0.distcp").write_bytes(b"half")
    Folder(root, 6).begin()
    assert choose(root)[0] is None and fault_of(folder.path) is None


def test_a_damaged_copy_is_not_restored(root, folder):
    folder.begin()
    cut(root / "replaced.iter_0000006" / "__0_0.distcp")
    assert choose(root)[0] == 4
    assert (root / TRACKER).read_text() == "6"
