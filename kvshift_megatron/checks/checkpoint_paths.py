"""Megatron's names in a checkpoint folder: the tracker file, and one folder per iteration.

    ROOT/latest_checkpointed_iteration.txt    "1500", or "release"
    ROOT/iter_0001500/                        or ROOT/release/
    ROOT/non_persistent/                      the same again, for those that the next ones replace

Imports neither Megatron nor torch, so that commands that need only names are fast.
"""

import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
NON_PERSISTENT = "non_persistent"

_MOST = 80  # bytes of a tracker file that are read: no name of an iteration is longer


def iteration_folder(root: Path, iteration: int | str) -> Path:
    """Return the folder of one iteration.

    Args:
        root: The checkpoint folder.
        iteration: A number of steps, as a number or its digits, or "release".

    Raises:
        ValueError: `iteration` is none of these.
    """
    return root / (RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}")


def stored_iterations(root: Path) -> list[int]:
    """Return the iterations that have a folder in `root`, ascending."""
    names = (re.fullmatch(r"iter_([0-9]{7,})", path.name) for path in root.glob("iter_*"))
    return sorted(int(name[1]) for name in names if name)


def read_tracker(root: Path) -> str | None:
    r"""Return the text of the tracker file in `root`, stripped; None if there is no such file.

    Bytes that are not UTF-8 are written as \xNN, so that the text is never that of a number.

    Raises:
        ValueError: The file, or `root`, is there and cannot be read; the message says why.
    """
    path = root / TRACKER
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode(errors="backslashreplace").strip()
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise ValueError(
            f"{root} is not a folder, as checkpoints need: give their folder"
        ) from error
    except IsADirectoryError as error:
        raise ValueError(
            f"{path} is a folder and should be the file that names the latest checkpoint: remove it"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): give this user the permission to read the "
            "file and its folder"
        ) from error


def tracked_iteration(root: Path) -> int | str | None:
    """Return what the tracker file in `root` names: an iteration, "release", or None without one.

    Read the number as Megatron does, with Python's int().

    Raises:
        ValueError: The file cannot be read, or names something else.
    """
    text = read_tracker(root)
    if text is None or text == RELEASE:
        return text
    try:
        iteration = int(text)
    except ValueError:
        iteration = -1
    if iteration < 0:
        raise ValueError(
            f"{root / TRACKER} holds {text!r}, which is neither a number of steps nor 'release': "
            "write the iteration of a complete checkpoint into it, or remove it and set --ckpt-step"
        )
    return iteration
