"""Settle before anything is built which checkpoint the run loads, and refuse what it cannot load.

`fallback` chooses within one folder. Here are the rules for a run: what the user named is not
replaced; of persistent and non-persistent checkpoints the last complete one counts.
"""

import os
import sys
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

from kvshift_megatron.checks import integrity
from kvshift_megatron.checks.checkpoint_paths import (
    RELEASE,
    TRACKER,
    iteration_folder,
    read_tracker,
)
from kvshift_megatron.checks.stored_files import read_checkpoint
from kvshift_megatron.checks.to_load import ToLoad, checkpoint_to_load, non_persistent_root
from kvshift_megatron.training.faults import agreement
from kvshift_megatron.training.faults.fallback import choose, fault_of, last_complete, write_tracker

_ASIDE = ".damaged"  # after the name of a tracker file none of whose checkpoints can be loaded


def settle_checkpoint(args: Namespace) -> None:
    """Have Megatron load the last complete checkpoint, as if `--ckpt-step` had named it.

    Collective over all ranks of the launch, before Megatron finally parses its arguments and before
    the process groups exist: rank 0 looks at the files and decides for all. If the user names a
    checkpoint (`--ckpt-step`, `--finetune`, `--pretrained-checkpoint` alone), no other takes its
    place.

    Args:
        args: Megatron's arguments, as parsed from sys.argv, to which this function may append.

    Raises:
        ValueError: There is nothing that can be loaded, or what was named is damaged; on every
            rank.
    """
    if args.load is None and args.pretrained_checkpoint is None:
        return
    instead, warnings = agreement.decided_by_rank_0(
        "checkpoint to load",
        lambda: _decide(args),
        timedelta(minutes=args.distributed_timeout_minutes),
    )
    if int(os.environ.get("RANK", "0")) == 0:
        for warning in warnings:
            print(f"kvshift_megatron: WARNING: load: {warning}", file=sys.stderr, flush=True)
    if instead is not None:
        sys.argv += ["--ckpt-step", str(instead)]


def _decide(args: Namespace) -> tuple[int | None, list[str]]:
    """Return (what `--ckpt-step` is to be or None, warnings)."""
    instead: int | None = None
    warnings: list[str] = []
    named = args.ckpt_step or args.finetune
    if args.load is not None and "://" not in args.load and not named:
        instead, warnings = last_of_a_run(Path(args.load), args)
    step = args.ckpt_step if instead is None else instead
    found = checkpoint_to_load(Namespace(**{**vars(args), "ckpt_step": step}))
    if found is not None:
        return instead, [*warnings, *_inspected(found, args.verify_integrity)]
    for flag in ("exit_on_missing_checkpoint", "ckpt_convert_format"):
        if getattr(args, flag):
            raise ValueError(
                f"load: {args.load} holds no checkpoint, and {flag} needs one: give the folder "
                f"that holds {TRACKER}"
            )
    return instead, warnings


def _inspected(found: ToLoad, verify_integrity: bool) -> list[str]:
    """Raise ValueError if a checkpoint is damaged; return warnings."""
    read_checkpoint(found.directory)
    if found.format != "torch_dist" or not verify_integrity:
        return []
    if not integrity.has_manifest(found.directory):
        return [
            f"the checkpoint {found.directory} has no {integrity.MANIFEST}, so its files were not "
            "compared with their hashes, only their lengths with what they should be"
        ]
    fault = integrity.difference(found.directory)
    if fault is not None:
        raise ValueError(
            f"load: {fault}: copy it again, set --ckpt-step to another iteration, or load it as it "
            "is with --no-verify-integrity"
        )
    return []


def last_of_a_run(root: Path, args: Namespace) -> tuple[int | None, list[str]]:
    """Return what to load instead of what the tracker files of a run name.

    Args:
        root: As for `--load`.
        args: Megatron's, for the place of non-persistent checkpoints and whether to verify.

    Returns:
        (what `--ckpt-step` is to be, or None; warnings).

    Raises:
        ValueError: There are checkpoints, and none is complete.
    """
    try:
        named = read_tracker(root)
    except ValueError as error:
        raise ValueError(f"load: {error}") from error
    temporary, warnings = _last_non_persistent(root, args)
    if temporary is not None and temporary >= _as_number(named):
        return None, warnings  # Megatron does not look at the persistent ones
    try:
        instead, more = choose(root, args.verify_integrity)
    except ValueError as error:
        if temporary is None:
            raise
        # With this --ckpt-step Megatron takes the non-persistent one of the same iteration.
        fault = str(error).removeprefix("load: ").rpartition(": ")[0]
        return temporary, [
            *warnings,
            f"{fault}; the run loads the non-persistent one of iteration {temporary}",
        ]
    if temporary is not None and instead is not None and temporary >= instead:
        more = [*more, f"instead of that one, the non-persistent one of iteration {temporary}"]
    return instead, [*warnings, *more]


def _as_number(named: str | None) -> float:
    """Return the iteration that Megatron compares; infinity for a name that `choose` corrects."""
    if named is None:
        return -1
    return 0 if named == RELEASE else int(named) if named.isdecimal() else float("inf")


def _last_non_persistent(root: Path, args: Namespace) -> tuple[int | None, list[str]]:
    """Return the last complete non-persistent checkpoint, after having its tracker file name it."""
    folder = non_persistent_root(root, args)
    named = None if folder is None else read_tracker(folder)
    if folder is None or named is None or named == RELEASE:
        return None, []
    before, tracker = _as_number(named), folder / TRACKER
    if before == float("inf"):
        fault: str | None = f"{tracker} cannot be read (it holds {named!r})"
    else:
        fault = fault_of(iteration_folder(folder, named), args.verify_integrity)
    if fault is None:
        return int(named), []
    found, others = last_complete(folder, before, args.verify_integrity)
    faults = "; ".join([fault, *others])
    try:
        if found is not None:
            write_tracker(tracker, str(found))
            return found, [f"{faults}; the last complete non-persistent one is that of {found}"]
        tracker.replace(tracker.with_name(tracker.name + _ASIDE))
    except OSError as error:
        raise ValueError(
            f"load: {faults}; {tracker} cannot be changed ({error.strerror}): remove it, or drop "
            "--non-persistent-ckpt-type to load a persistent checkpoint"
        ) from error
    return None, [f"{faults}; no non-persistent checkpoint is complete, so none is loaded"]
