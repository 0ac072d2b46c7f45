"""Refuse at the start what the first save, hours later, could not write to."""

import os
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

from kvshift_megatron.training.faults import agreement

# Megatron's flags that name a folder for checkpoints.
_FOLDERS = ("save", "ckpt_convert_save", "non_persistent_global_ckpt_dir")


def check_places(args: Namespace) -> None:
    """Raise ValueError on every rank if this user cannot save where the flags say.

    Collective over all ranks of the launch; rank 0 looks.

    Args:
        args: Megatron's, as parsed.
    """
    named = {name: getattr(args, name, None) for name in _FOLDERS}
    places = {name: place for name, place in named.items() if place}
    if places:  # the same on every rank
        agreement.decided_by_rank_0(
            "places to write to",
            lambda: _refuse(places),
            timedelta(minutes=args.distributed_timeout_minutes),
        )


def _refuse(places: dict[str, str]) -> None:
    for name, place in places.items():
        fault = None if "://" in place else fault_of_folder(Path(place))
        if fault is not None:
            raise ValueError(f"{name}: {fault}: give a folder that this user may write to")


def fault_of_folder(folder: Path) -> str | None:
    """Return why nothing can be written to a folder that may not exist yet; None if it can."""
    there = folder.absolute()
    try:
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        if not there.is_dir():
            return f"{there} is not a folder" if there.exists() else f"{there} leads nowhere"
    except OSError as error:
        return f"{folder} cannot be reached ({error.strerror})"
    if os.access(there, os.W_OK | os.X_OK):
        return None
    what = "cannot be written to" if there == folder.absolute() else "cannot be created"
    return f"{folder} {what} (no permission in {there}, or it is read-only)"
