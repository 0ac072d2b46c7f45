"""The folder of one checkpoint, from an empty one to one that counts. For rank 0."""

import shutil
from argparse import Namespace
from pathlib import Path

from kvshift_megatron.checks.checkpoint_paths import RELEASE, TRACKER, iteration_folder
from kvshift_megatron.training.faults.fallback import REPLACED, fault_of


def save_dir(args: Namespace, non_persistent: bool) -> Path | None:
    """Where Megatron saves, in the format whose saves can be agreed on; None for the others."""
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
        iteration: as Megatron counts.
        release: whether it is the release, which has no number.
    """

    def __init__(self, root: Path, iteration: int, release: bool = False):
        self.path = iteration_folder(root, RELEASE if release else iteration)
        self._replaced = self.path.with_name(REPLACED + self.path.name)
        self._begun = False

    def begin(self) -> None:
        """Make it, empty: the files of two saves together would pass for one.

        A whole checkpoint of the same iteration is put aside until this one counts.

        Raises:
            OSError: it could not be made or emptied.
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
        """The checkpoint counts: drop what it replaced."""
        shutil.rmtree(self._replaced, ignore_errors=True)

    def give_up(self) -> str:
        """Remove what has been written, and put back what it would have replaced; in words."""
        if not self._begun:
            return f"{self.path} is as it was."
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():
            return f"What was written could not be removed from {self.path}; it has no .metadata."
        if self._replaced.exists():
            self._replaced.rename(self.path)
            return f"{self.path} was put back as it was."
        return f"{self.path} was removed."

    def newest(self) -> int | None:
        """The iteration that the tracker file names; None where there is none."""
        try:
            return int((self.path.parent / TRACKER).read_text())
        except (OSError, ValueError):
            return None
