"""Which checkpoint Megatron will load, against Megatron's own `load_checkpoint`."""

import itertools
import json
import os
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing
from megatron.training import checkpointing

from kvshift_megatron.checks.checkpoint_paths import TRACKER, iteration_folder, read_tracker
from kvshift_megatron.checks.to_load import ToLoad, checkpoint_to_load, stored_format


def make(folder: Path, tracker: str | None, kind: str = "torch_dist") -> str:
    """Make a root folder with the iterations 10, 20 and 30 and a release, all without content."""
    for name in (10, 20, 30, "release"):
        directory = iteration_folder(folder, name)
        directory.mkdir(parents=True)
        if kind == "torch_dist":
            config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
            (directory / "metadata.json").write_text(json.dumps(config))
        if kind == "torch":
            (directory / "mp_rank_00").mkdir()
            (directory / "mp_rank_00" / "model_optim_rng.pt").touch()
        if kind in ("torch_dist", "torch_dcp"):
            (directory / ".metadata").touch()
    if tracker is not None:
        (folder / TRACKER).write_text(tracker)
    return str(folder)


def arguments(**values) -> Namespace:
    """Return what `load_checkpoint` reads, as a run without these flags has it."""
    defaults = {
        **dict.fromkeys(("load", "pretrained_checkpoint", "ckpt_step")),
        **dict.fromkeys(("non_persistent_ckpt_type", "non_persistent_global_ckpt_dir")),
        **dict.fromkeys(("ckpt_convert_format", "ckpt_convert_save")),
        **{"finetune": False, "auto_detect_ckpt_format": False, "ckpt_format": "torch_dist"},
        **{"exit_on_missing_checkpoint": False, "use_dist_ckpt": True, "no_load_optim": None},
    }
    return Namespace(**{**defaults, **values})


class _LoadedError(Exception):
    """Carries what `_load_base_checkpoint` returned."""


@pytest.fixture
def megatron_loads(monkeypatch):
    """Return a function that runs Megatron's `load_checkpoint` until it knows its folder.

    The function returns (folder, format, whether Megatron fine-tunes), or what ended Megatron.
    """
    original = checkpointing._load_base_checkpoint

    def stop(*args, **kwargs):
        raise _LoadedError(original(*args, **kwargs))

    monkeypatch.setattr(checkpointing, "_load_base_checkpoint", stop)
    # The folders have no content.
    monkeypatch.setattr(dist_checkpointing, "load_common_state_dict", lambda _: {"args": None})
    monkeypatch.setattr(checkpointing.torch, "load", lambda *_, **__: {"args": None})
    monkeypatch.setattr(checkpointing.torch.distributed.checkpoint, "load", lambda **_: None)

    def loads(args):
        args = Namespace(**vars(args))
        monkeypatch.setattr(checkpointing, "get_args", lambda: args)
        try:
            checkpointing.load_checkpoint([], None, None)
        except _LoadedError as found:
            _, name, _, kind = found.args[0]
            if not name:
                return None
            formats = {"LEGACY": "torch", "GLOBAL": "torch_dist", "TORCH_DCP": "torch_dcp"}
            folder = Path(name)
            if kind.name == "LEGACY":
                folder = folder.parent.parent
            return folder, formats[kind.name], args.finetune
        except (SystemExit, Exception) as error:
            return error
        raise AssertionError("Megatron asked for no checkpoint")

    return loads


def agree(args: Namespace, expected) -> None:
    """Require the same answer, or a refusal if Megatron stopped."""
    if isinstance(expected, BaseException):
        with pytest.raises(ValueError, match=r"^[a-z_]+: .*: "):
            checkpoint_to_load(args)
        return
    found = checkpoint_to_load(args)
    if expected is None:
        assert found is None
        return
    assert (found.directory, found.format) == expected[:2]
    assert (found.is_pretrained or args.finetune) == expected[2]


TRACKERS = (None, "20", "release", "2_0", "junk", "-3", "")
STEPS = (None, 0, 10, -1)


@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("temporary", [None, "missing", "10", "20", "30", "release"])
def test_load_and_non_persistent(tmp_path, megatron_loads, tracker, temporary):
    """240 ways: tracker files, --ckpt-step, and non-persistent checkpoints in two places."""
    load = make(tmp_path / "run", tracker)
    make(tmp_path / "run" / "non_persistent", None if temporary == "missing" else temporary)
    other = make(tmp_path / "elsewhere", None if temporary == "missing" else temporary)
    kind = None if temporary is None else "global"
    seen = set()
    for step, place in itertools.product(STEPS, (None, other)):
        args = arguments(
            load=load,
            ckpt_step=step,
            non_persistent_ckpt_type=kind,
            non_persistent_global_ckpt_dir=place,
        )
        expected = megatron_loads(args)
        agree(args, expected)
        seen.add(type(expected))
    assert seen <= {tuple, type(None), SystemExit, AssertionError, RuntimeError}


@pytest.mark.parametrize("pretrained", [None, "30", "release", "junk"])
@pytest.mark.parametrize("tracker", [None, "20"])
@pytest.mark.parametrize("kind", [None, "global"])
def test_pretrained_checkpoints(tmp_path, megatron_loads, pretrained, tracker, kind):
    base = make(tmp_path / "base", pretrained)
    make(tmp_path / "base" / "non_persistent", "30")
    load = make(tmp_path / "run", tracker)
    make(tmp_path / "run" / "non_persistent", "20")
    for given, step in itertools.product((load, None, str(tmp_path / "new")), STEPS):
        args = arguments(
            load=given, pretrained_checkpoint=base, ckpt_step=step, non_persistent_ckpt_type=kind
        )
        agree(args, megatron_loads(args))


@pytest.mark.parametrize("kind", ["torch_dist", "torch", "torch_dcp", "none"])
@pytest.mark.parametrize("others", [{}, {"ckpt_convert_format": "torch"}, {"finetune": True}])
def test_formats(tmp_path, megatron_loads, kind, others):
    """The format is that of the folder, whatever is asked to be saved."""
    args = arguments(load=make(tmp_path / "run", "20", kind), **others)
    expected = megatron_loads(args)
    if kind == "none":
        assert isinstance(expected, NotImplementedError)
        assert checkpoint_to_load(args).format is None  # `read_checkpoint` refuses it
    else:
        agree(args, expected)
        assert checkpoint_to_load(args).format == kind


def test_a_folder_of_two_formats_is_what_megatron_takes_it_for(tmp_path, megatron_loads):
    root = Path(make(tmp_path / "run", "20", "torch"))
    (root / "iter_0000020" / ".metadata").touch()
    args = arguments(load=str(root))
    agree(args, megatron_loads(args))
    assert checkpoint_to_load(args).format == "torch"


def test_fsdp_reads_torchs_plain_format_in_its_own_way(tmp_path):
    root = Path(make(tmp_path / "run", "20", "torch_dcp"))
    assert stored_format(root / "iter_0000020", uses_fsdp=True) == "fsdp_dtensor"
    found = checkpoint_to_load(arguments(load=str(root), use_megatron_fsdp=True))
    assert found.format == "fsdp_dtensor"


def test_nothing_to_load(tmp_path):
    assert checkpoint_to_load(arguments()) is None
    # A script of the user's may lack every flag.
    assert checkpoint_to_load(Namespace()) is None
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert checkpoint_to_load(arguments(load=str(tmp_path / name))) is None


def test_a_non_persistent_checkpoint_is_told_apart(tmp_path):
    load = make(tmp_path / "run", "20")
    make(tmp_path / "run" / "non_persistent", "30")
    found = checkpoint_to_load(arguments(load=load, non_persistent_ckpt_type="global"))
    expected = tmp_path / "run" / "non_persistent" / "iter_0000030"
    assert found == ToLoad(expected, 30, "torch_dist", is_non_persistent=True)


@pytest.mark.parametrize("kind", ["local", "in_memory"])
def test_kinds_that_only_their_library_can_read_are_refused(tmp_path, kind):
    args = arguments(load=make(tmp_path / "run", "20"), non_persistent_ckpt_type=kind)
    with pytest.raises(ValueError, match=rf"^non_persistent_ckpt_type={kind} .*: use --non-pers"):
        checkpoint_to_load(args)
    args.load = None
    assert checkpoint_to_load(args) is None


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_object_stores_are_refused(flag):
    with pytest.raises(ValueError, match=f"^{flag}: .*msc://bucket/run .*file system: copy it"):
        checkpoint_to_load(arguments(**{flag: "msc://bucket/run"}))


# --- tracker files that cannot be read ---


@pytest.mark.parametrize("content", [b"\xff\xfe2\x000\x00", b"20\xff", b"\x00" * 500, b"9" * 500])
def test_bytes_that_are_no_text_name_no_iteration(tmp_path, content):
    (tmp_path / TRACKER).write_bytes(content)
    assert len(read_tracker(tmp_path)) <= 320
    if content != b"9" * 500:
        with pytest.raises(ValueError, match=rf"^load: {tmp_path}/{TRACKER} holds "):
            checkpoint_to_load(arguments(load=str(tmp_path)))


def test_a_folder_in_the_place_of_the_tracker_file(tmp_path):
    (tmp_path / TRACKER).mkdir()
    with pytest.raises(ValueError, match=rf"^load: {tmp_path}/{TRACKER} is a folder .*: remove it"):
        checkpoint_to_load(arguments(load=str(tmp_path)))


def test_a_file_in_the_place_of_the_folder(tmp_path):
    file = tmp_path / "model.zip"
    zipfile.ZipFile(file, "w").close()
    for flag in ("load", "pretrained_checkpoint"):
        with pytest.raises(ValueError, match=rf"^{flag}: {file} is not a folder"):
            checkpoint_to_load(arguments(**{flag: str(file)}))


def test_a_folder_that_this_user_may_not_read(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\): give this user"):
        checkpoint_to_load(arguments(load=str(tmp_path)))
    assert os.access(tmp_path, os.R_OK)
