"""Megatron's arguments in the checkpoint that it will load, read by the code that loads it."""

import contextlib
import io
from argparse import Namespace
from typing import Any

from kvshift_megatron.arguments import set_arguments

# What Megatron reads before it finds the saved arguments, for scripts that lack a flag.
_LOAD_DEFAULTS: dict[str, Any] = {
    "load": None,
    "pretrained_checkpoint": None,
    "ckpt_step": None,
    "non_persistent_ckpt_type": None,
    "non_persistent_global_ckpt_dir": None,
    "use_tokenizer_model_from_checkpoint_args": False,
    "use_mp_args_from_checkpoint_args": False,
}
# The last read: the arguments (the object itself, and what names a checkpoint), and the outcome.
_read: tuple[Namespace, tuple, Namespace | None] | None = None


def saved_arguments(args: Namespace) -> Namespace | None:
    """Return the arguments in the checkpoint that Megatron will load, as Megatron itself reads it.

    Collective over all ranks if torch's process groups exist, because Megatron's reading is.

    Args:
        args: Megatron's; they do not change.

    Returns:
        The saved arguments; None if nothing is loaded, or if the checkpoint holds no arguments.

    Raises:
        ValueError: The checkpoint cannot be read.
    """
    global _read
    key = tuple(getattr(args, name, default) for name, default in _LOAD_DEFAULTS.items())
    if _read is None or _read[0] is not args or _read[1] != key:
        _read = args, key, _saved_arguments(args)
    return _read[2]


def _saved_arguments(args: Namespace) -> Namespace | None:
    from megatron.training.checkpointing import checkpoint_exists

    load, pretrained = (getattr(args, name, None) for name in ("load", "pretrained_checkpoint"))
    is_pretrained = pretrained is not None and not checkpoint_exists(load)
    copy = Namespace(**vars(args))
    return take_arguments(copy, "pretrained_checkpoint" if is_pretrained else "load")


def take_arguments(args: Namespace, flag: str) -> Namespace | None:
    """Have Megatron take what `--use-checkpoint-args` takes, without what it prints.

    Args:
        args: Megatron's, changed in place.
        flag: Names the folder: "load" or "pretrained_checkpoint".

    Returns:
        All saved arguments; None if there is no folder, no checkpoint in it, or none in that.

    Raises:
        ValueError: The checkpoint cannot be read.
    """
    folder = getattr(args, flag, None)
    if folder is None:
        return None
    from megatron.training.checkpointing import load_args_from_checkpoint
    from torch.distributed.checkpoint import CheckpointException

    set_arguments(args, {**_LOAD_DEFAULTS, **vars(args)})
    exits = getattr(args, "exit_on_missing_checkpoint", False)
    args.exit_on_missing_checkpoint = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = load_args_from_checkpoint(args, load_arg=flag)
    # Damage can raise anything, and in the older format Megatron then ends the process.
    except (Exception, SystemExit, CheckpointException) as error:
        why = str(error).strip().rpartition("\n")[2]
        raise ValueError(
            f"{flag}: the arguments saved in the checkpoint in {folder} cannot be read "
            f"({type(error).__name__}: {why}): copy it again, or load another one"
        ) from error
    finally:
        args.exit_on_missing_checkpoint = exits
    return found[1] if isinstance(found, tuple) else None


def folder_to_load(args: Namespace) -> Any:
    """Return the folder that Megatron's arguments name for loading, for messages."""
    return getattr(args, "load", None) or getattr(args, "pretrained_checkpoint", None)
