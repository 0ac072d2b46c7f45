"""Megatron's names in a checkpoint folder: the tracker file, and one folder per iteration.

    ROOT/latest_checkpointed_iteration.txt    "1500", or "release"
    ROOT/iter_0001500/                        or ROOT/release/

Imports neither Megatron nor torch, so that commands that need only names are fast.
"""

import re
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


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
    """Return the text of the tracker file in `root`, stripped; None if there is no such file."""
    path = root / TRACKER
    return path.read_text().strip() if path.is_file() else None
