"""Choose the checkpoint that is loaded from one folder if the latest one is damaged.

Megatron loads the checkpoint that latest_checkpointed_iteration.txt names, or ends. If that
checkpoint is damaged, the run loads the last complete one before it and logs a warning. A complete
checkpoint of another model is not damaged: `checks.checkpoint` looks at what is loaded, and refuses
it later.
"""

import os
import re
import shutil
from pathlib import Path

from kvshift_megatron.checks import integrity
from kvshift_megatron.checks.checkpoint_paths import (
    RELEASE,
    TRACKER,
    iteration_folder,
    read_tracker,
    stored_iterations,
)
from kvshift_megatron.checks.stored_files import DamagedCheckpointError, read_checkpoint

# Prefix of a complete checkpoint's folder while the same iteration is being saved again.
REPLACED = "replaced."


def choose(root: Path, verify_integrity: bool = False) -> tuple[int | None, list[str]]:
    """Return what to load from a `--load` folder instead of what its tracker file names.

    Rewrite a tracker file that is missing or unreadable: Megatron would start from random weights,
    or end with exit code 0.

    Args:
        root: Folder with the iter_* folders and the tracker file.
        verify_integrity: Whether to compare the files with their hashes too, if these were written.

    Returns:
        (iteration, warnings); the iteration is None to load what the tracker file names, or to
        start from scratch if there is none.

    Raises:
        ValueError: No checkpoint is complete.
    """
    named = read_tracker(root)
    if named == RELEASE:
        return None, []
    # int() would also accept "1_0" or " 10".
    if named is None or re.fullmatch(r"[0-9]+", named) is None:
        return None, _without_tracker(root, named, verify_integrity)
    latest = iteration_folder(root, named)
    fault = fault_of(latest, verify_integrity)
    if fault is None:
        return None, []
    replaced = latest.with_name(REPLACED + latest.name)
    if replaced.is_dir() and fault_of(replaced, verify_integrity) is None:
        try:
            shutil.rmtree(latest, ignore_errors=True)
            replaced.rename(latest)
        except OSError as error:
            raise ValueError(
                f"load: {fault}; the complete one is in {replaced}, which cannot be renamed "
                f"({error.strerror}): rename it to {latest.name}, or set --ckpt-step"
            ) from error
        return None, [
            f"{fault}; a new save of this iteration was interrupted: the run restores and loads "
            "the checkpoint from before that save, and no steps are lost"
        ]
    found, others = last_complete(root, int(named), verify_integrity)
    if found is None:
        raise ValueError(
            f"load: {fault}; no checkpoint before it in {root} is complete"
            f"{''.join(f'; {other}' for other in others)}: copy a complete one there, or start "
            "from scratch with another --load folder"
        )
    return found, [
        f"{'; '.join([fault, *others])}; the run loads the last complete checkpoint, "
        f"{iteration_folder(root, found)}: {int(named) - found} steps are lost and repeated"
    ]


def fault_of(directory: Path, verify_integrity: bool = False) -> str | None:
    """Return what is wrong with a checkpoint, in words; None if it is complete.

    Args:
        directory: The folder of one iteration.
        verify_integrity: Whether to compare the files with their hashes too, if these were written.
    """
    try:
        read_checkpoint(directory)
    except DamagedCheckpointError as error:
        return error.fault
    if verify_integrity and integrity.has_manifest(directory):
        return integrity.difference(directory)
    return None


def last_complete(
    root: Path, before: float, verify_integrity: bool
) -> tuple[int | None, list[str]]:
    """Return (the last complete iteration below `before`, the faults of the later ones)."""
    faults: list[str] = []
    for iteration in reversed(stored_iterations(root)):
        if iteration < before:
            fault = fault_of(iteration_folder(root, iteration), verify_integrity)
            if fault is None:
                return iteration, faults
            faults.append(fault)
    return None, faults


def _without_tracker(root: Path, content: str | None, verify_integrity: bool) -> list[str]:
    """Rewrite the tracker file if a checkpoint is complete, and return the warnings."""
    tracker = root / TRACKER
    is_missing = content is None
    what = f"{tracker} {'is missing' if is_missing else f'cannot be read (it holds {content!r})'}"
    found, faults = last_complete(root, float("inf"), verify_integrity)
    passed_over = "".join(f"; {fault}" for fault in faults)
    if found is None:
        if is_missing:
            # The first save may have been interrupted; Megatron starts from scratch.
            start = "no checkpoint is complete, so the run starts from scratch"
            return [f"{what}{passed_over}; {start}"] if faults else []
        raise ValueError(
            f"load: {what}{passed_over}; no checkpoint in {root} is complete: delete the tracker "
            "file to start from scratch, or copy a complete checkpoint there"
        )
    try:
        write_tracker(tracker, str(found))
    except OSError as error:
        raise ValueError(
            f"load: {what} and cannot be written ({error}): write {found}, the iteration of the "
            "last complete checkpoint, into it, or set --ckpt-step"
        ) from error
    return [
        f"{what}{passed_over}; the tracker file now names {found}, the last complete checkpoint, "
        "which the run loads: any later steps are lost and repeated"
    ]


def write_tracker(tracker: Path, content: str) -> None:
    """Replace the tracker file atomically, so that it always names the old or the new checkpoint.

    Raises:
        OSError: It could not be written; the old one is unchanged.
    """
    new = tracker.with_name(tracker.name + ".new")
    try:
        with open(new, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, tracker)
    except OSError:
        new.unlink(missing_ok=True)
        raise
