"""Which checkpoint a resuming run loads, where the newest one is damaged.

Megatron reads latest_checkpointed_iteration.txt and loads what it names, or ends. Here the newest
whole checkpoint before it is loaded instead, loudly. A checkpoint that is whole but of another
model is no damage: `checkpoint_check` refuses it later, as it looks at the one that is loaded.
"""

import os
import re
import shutil
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from kvshift_megatron.checks.checkpoint_paths import (
    RELEASE,
    TRACKER,
    iteration_folder,
    read_tracker,
    stored_iterations,
)
from kvshift_megatron.checks.stored_files import DamagedCheckpointError, read_checkpoint
from kvshift_megatron.training.faults import agreement

# Before the name of a whole checkpoint while one of the same iteration is being saved.
REPLACED = "replaced."


def settle_checkpoint(args: Namespace) -> None:
    """Have Megatron load the newest whole checkpoint, as if `--ckpt-step` had named it.

    Collective over all ranks of the launch, before Megatron reads its arguments for good and before
    the process groups exist: rank 0 looks at the files and decides for all. Nothing happens where
    the user has named a checkpoint (`--ckpt-step`, `--finetune`, `--pretrained-checkpoint` alone)
    or saves non-persistent ones too; a damaged one is refused then.

    Args:
        args: Megatron's arguments, as parsed from sys.argv, which this may add to.

    Raises:
        ValueError: nothing that is there can be loaded; on every rank alike.
    """
    if args.load is None or args.ckpt_step or args.finetune or args.non_persistent_ckpt_type:
        return
    instead, warnings = agreement.decided_by_rank_0(
        "checkpoint to load",
        lambda: choose(Path(args.load), args.verify_integrity),
        timedelta(minutes=args.distributed_timeout_minutes),
    )
    if int(os.environ.get("RANK", "0")) == 0:
        for warning in warnings:
            print(f"kvshift_megatron: WARNING: load: {warning}", file=sys.stderr, flush=True)
    if instead is not None:
        sys.argv += ["--ckpt-step", str(instead)]


def choose(root: Path, verify_integrity: bool = False) -> tuple[int | None, list[str]]:
    """What to load from a `--load` folder instead of what its tracker file names.

    Writes the tracker file where there is none that can be read, as Megatron would start from
    random weights there, or end with exit code 0.

    Args:
        root: with iter_* folders and the tracker file.
        verify_integrity: whether to compare the files with their recorded hashes, too.

    Returns:
        (the iteration; None for what the tracker names, or for a start from scratch, warnings).

    Raises:
        ValueError: no checkpoint is whole.
    """
    named = read_tracker(root)
    if named == RELEASE:
        return None, []
    # int() would also take "1_0" or " 10".
    if named is None or re.fullmatch(r"[0-9]+", named) is None:
        return None, _without_tracker(root, named, verify_integrity)
    newest = iteration_folder(root, named)
    fault = fault_of(newest, verify_integrity)
    if fault is None:
        return None, []
    replaced = newest.with_name(REPLACED + newest.name)
    if replaced.is_dir() and fault_of(replaced, verify_integrity) is None:
        shutil.rmtree(newest, ignore_errors=True)
        replaced.rename(newest)
        return None, [f"{fault}; it was being saved anew, and is put back as it was before"]
    found, others = _newest_whole(root, int(named), verify_integrity)
    if found is None:
        raise ValueError(
            f"load: {fault}; no checkpoint before it in {root} is whole"
            f"{''.join(f'; {other}' for other in others)}: copy one again, or start anew with "
            "another --load"
        )
    return found, [
        f"{'; '.join([fault, *others])}; the run goes on from the newest whole checkpoint before "
        f"it, {iteration_folder(root, found)}: {int(named) - found} steps are lost and done again"
    ]


def fault_of(directory: Path, verify_integrity: bool = False) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole.

    One of a format with one file a rank always passes: it has no description to compare with.
    """
    try:
        if read_checkpoint(directory) is not None and verify_integrity:
            verify_integrity_manifest(str(directory))
    except DamagedCheckpointError as error:
        return error.fault
    except CheckpointingException as error:
        return f"the checkpoint {directory} is not what was saved ({error})"
    return None


def _newest_whole(root: Path, before: float, verify_integrity: bool) -> tuple[int | None, list]:
    """(the newest whole iteration below `before`, the faults of those that were passed over)."""
    faults = []
    for iteration in reversed(stored_iterations(root)):
        if iteration < before:
            fault = fault_of(iteration_folder(root, iteration), verify_integrity)
            if fault is None:
                return iteration, faults
            faults.append(fault)
    return None, faults


def _without_tracker(root: Path, content: str | None, verify_integrity: bool) -> list[str]:
    """Write the tracker file anew where there is a whole checkpoint; what to say about it."""
    tracker = root / TRACKER
    is_missing = content is None
    what = f"{tracker} {'is missing' if is_missing else f'cannot be read (it holds {content!r})'}"
    found, faults = _newest_whole(root, float("inf"), verify_integrity)
    passed_over = "".join(f"; {fault}" for fault in faults)
    if found is None:
        if is_missing:
            # Megatron starts from scratch: the first save may have been interrupted.
            start = "no checkpoint has been completed, so that the run starts from scratch"
            return [f"{what}{passed_over}; {start}"] if faults else []
        raise ValueError(
            f"load: {what}{passed_over}; no checkpoint in {root} is whole: delete the tracker file "
            "to start from scratch, or copy a checkpoint there again"
        )
    try:
        write_tracker(tracker, str(found))
    except OSError as error:
        raise ValueError(
            f"load: {what}, and cannot be written anew ({error}): write {found}, the newest whole "
            "checkpoint, into it, or set --ckpt-step"
        ) from error
    return [
        f"{what}{passed_over}; it now names {found}, the newest whole checkpoint, which the run "
        "goes on from: steps that were saved after it are lost and done again"
    ]


def write_tracker(tracker: Path, content: str) -> None:
    """Replace the tracker file at once, so that it always names one checkpoint or the other.

    Raises:
        OSError: it could not be written; the old one is as it was.
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
