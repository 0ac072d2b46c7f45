"""Read what a distributed checkpoint holds, and check that its files are complete."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from kvshift_megatron.checks.to_load import CONFIG, stored_format
from kvshift_megatron.utils import inert_pickle

# Only Megatron's torch_dist holds an object of this name (in older releases a file, common.pt).
_COMMON_STATE = "common_state"
_REMEDY = "copy it again, or set --ckpt-step to another iteration"
# The first bytes of what torch.save wrote before it wrote zip files.
_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class DamagedCheckpointError(ValueError):
    """A checkpoint is missing, incomplete or unreadable.

    Args:
        fault: What is wrong, with the checkpoint's folder.
        remedy: What to do, in the imperative.
    """

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"load: {fault}: {remedy}")
        self.fault = fault


class StoredModel(NamedTuple):
    """The model's part of a distributed checkpoint.

    Args:
        shapes: Global shape of every tensor, by key.
        content: What Megatron noted about how it was saved, for `sharded_state_dict`; None in
            formats other than torch_dist, whose keys are not Megatron's.
    """

    shapes: dict[str, tuple[int, ...]]
    content: dict[str, Any] | None


def read_checkpoint(directory: Path) -> StoredModel | None:
    """Read a checkpoint's metadata, and check every file that it names.

    Args:
        directory: The folder of one iteration.

    Returns:
        The model's part, or None for the format without metadata (one file per rank).

    Raises:
        DamagedCheckpointError: The folder, its metadata or a file is missing, truncated or
            unreadable; the message names it.
        ValueError: The file system failed.
    """
    if not directory.is_dir():
        raise DamagedCheckpointError(
            f"there is no checkpoint folder {directory}, though the tracker file or --ckpt-step "
            "names it",
            "set --ckpt-step to an iteration that exists",
        )
    stored = stored_format(directory)
    is_torch_dist = stored == "torch_dist"
    if stored == "torch":
        _check_state_files(directory)
        return None
    if not (directory / ".metadata").is_file():
        raise DamagedCheckpointError(
            f"the checkpoint {directory} has no .metadata, so its save did not finish or it "
            "was not copied in full",
            _REMEDY,
        )
    try:
        # torch's reader, which Megatron uses next, would run whatever somebody has put there.
        with (directory / ".metadata").open("rb") as stream:
            metadata = inert_pickle.load_metadata(stream)
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
    except OSError as error:
        raise ValueError(
            f"load: the checkpoint {directory} cannot be read ({error}): check the file system"
        ) from error
    except inert_pickle.ForbiddenNameError as error:
        raise ValueError(
            f"load: .metadata of the checkpoint {directory} is not what Megatron saves: {error} "
            "(nothing of it was run): find out who wrote it, and load another checkpoint"
        ) from error
    # A damaged pickle can raise anything.
    except Exception as error:
        raise _unreadable(directory, ".metadata", error) from error
    keys = [key.split("/")[0] for key in metadata.state_dict_metadata]
    is_megatron_format = _COMMON_STATE in keys or (directory / "common.pt").is_file()
    if is_megatron_format and not is_torch_dist:
        raise DamagedCheckpointError(
            f"the checkpoint {directory} has no {CONFIG}, so its save did not finish or it "
            "was not copied in full",
            _REMEDY,
        )
    _check_files(directory, metadata)
    try:
        content = (
            dist_checkpointing.load_content_metadata(str(directory)) if is_torch_dist else None
        )
    except Exception as error:
        raise _unreadable(directory, "its common state", error) from error
    shapes = {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and "optimizer" not in key
    }
    return StoredModel(shapes, (content or {}) if is_torch_dist else None)


def _unreadable(directory: Path, part: str, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{part} of the checkpoint {directory} cannot be read ({type(error).__name__}: {error})",
        _REMEDY,
    )


def _check_files(directory: Path, metadata: Metadata) -> None:
    """Raise unless every file reaches the end of the last entry that is stored in it."""
    lengths: dict[str, tuple[int, str]] = {}
    for index, info in (metadata.storage_data or {}).items():
        end = info.offset + info.length
        if end > lengths.get(info.relative_path, (0, ""))[0]:
            lengths[info.relative_path] = end, index.fqn
    for name, (length, key) in sorted(lengths.items()):
        try:
            found = (directory / name).stat().st_size
        except FileNotFoundError:
            found = None
        if found is not None and found >= length:
            continue
        fault = "missing" if found is None else f"{found} bytes long and should be {length}"
        raise DamagedCheckpointError(
            f"the file {name} of the checkpoint {directory} is {fault} (it holds {key})", _REMEDY
        )


def _check_state_files(directory: Path) -> None:
    """Raise unless every file of the format with one file per rank is whole.

    torch.save writes the list of a zip file's parts last, so a file that is cut off lacks it.
    """
    for folder in sorted(directory.glob("mp_rank_*")):
        names = {path.name for path in folder.glob("*.pt")} | {"model_optim_rng.pt"}
        for file in sorted(folder / name for name in names):
            fault = _fault_of_state_file(file)
            if fault is not None:
                raise DamagedCheckpointError(
                    f"the file {folder.name}/{file.name} of the checkpoint {directory} {fault}",
                    _REMEDY,
                )


def _fault_of_state_file(file: Path) -> str | None:
    try:
        if zipfile.is_zipfile(file):
            return None
        with file.open("rb") as stream:
            is_older = stream.read(len(_BEFORE_ZIP)) == _BEFORE_ZIP
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if is_older else "is cut off, or not what torch.save wrote"
