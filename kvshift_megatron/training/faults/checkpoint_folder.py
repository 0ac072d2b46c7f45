"""The folder of one checkpoint, from empty to complete. Only rank 0 changes it."""

import shutil
from argparse import Namespace
from pathlib import Path

from kvshift_megatron.checks.checkpoint_paths import RELEASE, TRACKER, iteration_folder
from kvshift_megatron.training.faults.fallback import REPLACED, fault_of


def save_dir(args: Namespace, non_persistent: bool) -> Path | None:
    """Return where Megatron saves; None for formats in which the ranks cannot agree on a save."""
    if args.ckpt_format != "torch_dist" or not args.use_dist_ckpt or "://" in args.save:
        return None
    if args.async_save and args.async_strategy == "nvrx":
        return None
    if not non_persistent:
        return Path(args.save)
    if args.non_persistent_ckpt_type == "local":
        return None
    return Path(args.non_persistent_global_ckpt_dir or Path(args.save) / "non_persistent")


class Folder:
    """A checkpoint's folder.

    Args:
        root: Megatron's --save.
        iteration: As Megatron counts.
        release: Whether it is the release checkpoint, which has no iteration.
    """

    def __init__(self, root: Path, iteration: int, release: bool = False):
        self.path = iteration_folder(root, RELEASE if release else iteration)
        self._replaced = self.path.with_name(REPLACED + self.path.name)
        self._begun = False

    def begin(self) -> None:
        """Create the folder, empty: files of two saves together could pass for one checkpoint.

        A complete checkpoint of the same iteration is moved aside until this one is complete.

        Raises:
            OSError: The folder could not be created or emptied.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            if fault_of(self.path) is None:
                shutil.rmtree(self._replaced, ignore_errors=True)
                self.path.rename(self._replaced)
            else:
                shutil.rmtree(self.path)
        self._begun = True
        self.path.mkdir(parents=True, exist_ok=True)

    def complete(self) -> None:
        """Delete what the now complete checkpoint replaces."""
        shutil.rmtree(self._replaced, ignore_errors=True)

    def give_up(self) -> str:
        """Remove what has been written, restore what it would have replaced, and say so."""
        if not self._begun:
            return f"{self.path} is unchanged."
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():
            return f"The incomplete {self.path} could not be removed; it has no .metadata."
        if self._replaced.exists():
            self._replaced.rename(self.path)
            return f"{self.path} was restored from before the save."
        return f"{self.path} was removed."

    def latest(self) -> int | None:
        """Return the iteration that the tracker file names; None if there is none."""
        try:
            return int((self.path.parent / TRACKER).read_text())
        except (OSError, ValueError):
            return None
