"""Write an output folder that appears under its name only when complete, and report progress."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kvshift_megatron.utils.output_paths import check_outputs

_PACKAGE = Path(__file__).parents[2]  # its code is copied into exported folders


def check_target(target: Path, inputs: list[Path], overwrite: bool) -> None:
    """Refuse a target that cannot be written, or whose replacement would change an input.

    Raises:
        ValueError: The target is, contains or lies inside an input, it exists and `overwrite` is
            False, or its parent folder is missing.
    """
    check_outputs([target], [*inputs, _PACKAGE])
    if target.exists() and not overwrite:
        raise ValueError(
            f"{target} exists: add --overwrite to replace it, or choose another target"
        )
    if not target.resolve().parent.is_dir():
        raise ValueError(f"{target}: its parent folder {target.resolve().parent} does not exist")


def check_free_space(target: Path, needed: int) -> None:
    """Refuse to write more than the disk can hold.

    Args:
        target: The output folder.
        needed: Bytes of the tensors that will be written.

    Raises:
        ValueError: The disk has fewer bytes left.
    """
    free = shutil.disk_usage(target.resolve().parent).free
    if free < needed:
        raise ValueError(
            f"{target}: {needed / 1e9:.1f} GB will be written, but its disk has only "
            f"{free / 1e9:.1f} GB left"
        )


@contextlib.contextmanager
def complete_or_absent(target: Path) -> Iterator[Path]:
    """Create a folder beside the target; rename it to the target at the end, or remove it on error.

    An existing target stays in place until then.

    Yields:
        The folder to write into.
    """
    target = target.resolve()
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        if target.exists():
            target.rename(replaced)
        try:
            unfinished.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    except OSError as error:
        if error.filename is not None:
            raise
        # The error of a failed write names no file.
        raise OSError(error.errno, f"{error.strerror}; nothing was written", str(target)) from error
    finally:
        for leftover in (unfinished, replaced):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


class WriteProgress:
    """Print a line on standard error every few seconds, and one at the end.

    Args:
        total: Bytes that will be written.
        shown: False prints nothing.
        seconds: Time between two lines.
    """

    def __init__(self, total: int, shown: bool, seconds: float = 3.0):
        self._total, self._done, self._shown, self._every = total, 0, shown, seconds
        self._start = self._last = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes as written."""
        self._done += count
        now = time.monotonic()
        if not self._shown or (self._done < self._total and now - self._last < self._every):
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-6)
        print(
            f"converted {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB "
            f"({rate / 1e6:,.0f} MB/s)",
            file=sys.stderr,
            flush=True,
        )
