"""Say which checkpoint Megatron will load: its folder, iteration and format.

The rules are those of `load_checkpoint` and `_load_base_checkpoint` in
megatron.training.checkpointing, the same from 0.17 to 0.19. They are written down here because they
are needed before Megatron can load; `every_load` compares the answer with what is loaded.

Imports neither Megatron nor torch.
"""

from argparse import Namespace
from pathlib import Path
from typing import Literal, NamedTuple

from kvshift_megatron.checks.checkpoint_paths import (
    NON_PERSISTENT,
    RELEASE,
    TRACKER,
    iteration_folder,
    tracked_iteration,
)

Format = Literal["torch_dist", "torch", "torch_dcp", "fsdp_dtensor"]
# Megatron writes this file with its torch_dist format; torch's plain format lacks it.
CONFIG = "metadata.json"


class ToLoad(NamedTuple):
    """A checkpoint that Megatron will load.

    Args:
        directory: The folder of one iteration.
        iteration: As Megatron counts; 0 for a release.
        format: Of the files in the folder; None if it is missing or in none of Megatron's formats.
        is_pretrained: Whether `--pretrained-checkpoint` names it, so that only weights are loaded.
        is_non_persistent: Whether it is one of those that the next ones replace.
    """

    directory: Path
    iteration: int
    format: Format | None
    is_pretrained: bool = False
    is_non_persistent: bool = False


def checkpoint_to_load(args: Namespace) -> ToLoad | None:
    """Return the checkpoint that Megatron's arguments make it load; None if it starts from scratch.

    Args:
        args: Megatron's. Flags that a release or script lacks count as not set.

    Raises:
        ValueError: Megatron would stop, or which checkpoint it loads cannot be known before; the
            message says why and what to do.
    """
    load, pretrained = (getattr(args, name, None) for name in ("load", "pretrained_checkpoint"))
    for name in ("load", "pretrained_checkpoint", "non_persistent_global_ckpt_dir"):
        _check_place(name, getattr(args, name, None))
    if load is None and pretrained is None:
        return None
    if pretrained is not None and (load is None or _tracked("load", Path(load)) is None):
        if _tracked("pretrained_checkpoint", Path(pretrained)) is None:
            raise ValueError(
                f"pretrained_checkpoint: {pretrained} has no {TRACKER}, without which Megatron "
                "takes no checkpoint from there: give the folder above the iterations, or write "
                "the iteration, or 'release', into that file"
            )
        found = checkpoint_in(pretrained, args, "pretrained_checkpoint")
        return found and found._replace(is_pretrained=True)
    return checkpoint_in(load, args)


def checkpoint_in(root: str | Path | None, args: Namespace, flag: str = "load") -> ToLoad | None:
    """Return the checkpoint that Megatron loads from one root folder; None if there is none.

    Args:
        root: As for `--load`; None if there is no such folder.
        args: Megatron's, for what else has a say.
        flag: That named the folder, for messages.

    Raises:
        ValueError: As for `checkpoint_to_load`.
    """
    folder = None if root is None else Path(root)
    temporary = _non_persistent(folder, args)
    tracked = None if folder is None else _tracked(flag, folder)
    # --ckpt-step needs no tracker file, but does not win over the name "release" in one.
    number = -1 if tracked is None else 0 if tracked == RELEASE else int(tracked)
    iteration = int(getattr(args, "ckpt_step", None) or number)
    if temporary is not None and temporary.iteration >= iteration:
        return temporary
    if iteration == -1 or folder is None:
        return None
    directory = iteration_folder(folder, RELEASE if tracked == RELEASE else iteration)
    uses_fsdp = bool(getattr(args, "use_megatron_fsdp", False))
    return ToLoad(directory, iteration, stored_format(directory, uses_fsdp))


def non_persistent_root(root: Path | None, args: Namespace) -> Path | None:
    """Return where non-persistent global checkpoints lie; None if the run has none.

    Args:
        root: The folder of the persistent ones, if there is one.
        args: Megatron's.
    """
    if getattr(args, "non_persistent_ckpt_type", None) != "global":
        return None
    own = getattr(args, "non_persistent_global_ckpt_dir", None)
    if own:
        return Path(own)
    return None if root is None else root / NON_PERSISTENT


def stored_format(directory: Path, uses_fsdp: bool = False) -> Format | None:
    """Return the format of the checkpoint in a folder, as Megatron tells formats apart.

    Args:
        directory: The folder of one iteration; it may be missing.
        uses_fsdp: Whether Megatron's FSDP reads what has torch's plain format.
    """
    if (directory / CONFIG).exists():
        return "torch_dist"
    if any(directory.glob("mp_rank_0*")):
        return "torch"
    if (directory / ".metadata").exists():
        return "fsdp_dtensor" if uses_fsdp else "torch_dcp"
    return None


def _non_persistent(root: Path | None, args: Namespace) -> ToLoad | None:
    kind = getattr(args, "non_persistent_ckpt_type", None)
    if kind not in (None, "global"):
        raise ValueError(
            f"non_persistent_ckpt_type={kind} with a checkpoint to load: which one Megatron will "
            "load is known only to the library that keeps them, so it cannot be checked before: "
            "use --non-persistent-ckpt-type global, or leave it out to load a persistent one"
        )
    folder = non_persistent_root(root, args)
    iteration = None if folder is None else _tracked("non_persistent_global_ckpt_dir", folder)
    if folder is None or iteration is None:
        return None
    if iteration == RELEASE:
        raise ValueError(
            f"non_persistent_global_ckpt_dir: {folder / TRACKER} names a release, which Megatron "
            "does not load as a non-persistent checkpoint: give that folder to --load"
        )
    # Megatron does not look at the format of these.
    directory = iteration_folder(folder, iteration)
    return ToLoad(directory, int(iteration), "torch_dist", is_non_persistent=True)


def _tracked(flag: str, root: Path) -> int | str | None:
    try:
        return tracked_iteration(root)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def _check_place(flag: str, place: str | Path | None) -> None:
    if place is not None and "://" in str(place):
        raise ValueError(
            f"{flag}: the checkpoint at {place} cannot be checked before it is loaded, because it "
            "is not in a file system: copy it to a folder and load it from there"
        )
