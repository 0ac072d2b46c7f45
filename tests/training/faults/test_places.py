"""A run that could not save does not start."""

import os
from argparse import Namespace

import pytest
import torch

from kvshift_megatron.checks.checkpoint_paths import TRACKER
from kvshift_megatron.checks.to_load import checkpoint_to_load
from kvshift_megatron.training.faults import agreement
from kvshift_megatron.training.faults.places import check_places, fault_of_folder
from tests.support.odd_names import ODD

NOBODY = 65534


def as_nobody(ask):
    """Return what `ask` returns, or the ValueError's text, for a user without any rights."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            answer = str(ask())
        except ValueError as error:
            answer = str(error)
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return answer


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def reachable(tmp_path):
    """Let every user reach the test's folder, whose parents pytest keeps to this one."""
    # pytest-xdist puts a folder of its own between.
    closed = [folder for folder in (tmp_path, *tmp_path.parents) if not folder.stat().st_mode & 1]
    modes = {folder: folder.stat().st_mode for folder in closed}
    for folder in modes:
        folder.chmod(0o755)
    yield tmp_path
    for folder, mode in modes.items():
        folder.chmod(mode)


def test_folders_that_are_there_or_can_be_made(tmp_path):
    for folder in (tmp_path, tmp_path / "new" / "er", tmp_path / ODD):
        assert fault_of_folder(folder) is None


def test_places_that_are_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert fault_of_folder(tmp_path / "file") == f"{tmp_path}/file is not a folder"
    assert "is not a folder" in fault_of_folder(tmp_path / "file" / "below")
    assert fault_of_folder(tmp_path / "link" / "run") == f"{tmp_path}/link leads nowhere"


@needs_root
def test_an_unprivileged_user_in_a_read_only_folder(reachable):
    run = reachable / "run"
    run.mkdir()
    asked = {folder: as_nobody(lambda f=folder: fault_of_folder(f)) for folder in (run, run / "x")}
    assert f"{run} cannot be written to (no permission in {run}" in asked[run]
    assert f"{run}/x cannot be created (no permission in {run}" in asked[run / "x"]


@needs_root
def test_an_unprivileged_user_of_a_checkpoint_that_others_cannot_read(reachable):
    (reachable / TRACKER).write_text("2")
    args = Namespace(load=str(reachable))
    assert "iter_0000002" in as_nobody(lambda: checkpoint_to_load(args))
    (reachable / TRACKER).chmod(0o600)
    answer = as_nobody(lambda: checkpoint_to_load(args))
    assert answer.startswith(
        f"load: {reachable}/{TRACKER} cannot be read (Permission denied): give"
    )
    reachable.chmod(0o700)
    assert "cannot be read (Permission denied)" in as_nobody(lambda: checkpoint_to_load(args))


@pytest.mark.parametrize("flag", ["save", "ckpt_convert_save", "non_persistent_global_ckpt_dir"])
def test_the_flag_is_named(tmp_path, monkeypatch, flag):
    monkeypatch.setattr(agreement, "_store", torch.distributed.HashStore())
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    args = Namespace(distributed_timeout_minutes=1, **{flag: str(tmp_path / "file")})
    with pytest.raises(ValueError, match=rf"^{flag}: .*file is not a folder: give a folder"):
        check_places(args)
    setattr(args, flag, "msc://bucket/run")
    check_places(args)
