"""Files that appear whole under their name, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes under a temporary name beside `path`, then renames.

    Args:
        write: called with the temporary path.

    Raises:
        OSError: as writing or renaming did; what stood at `path` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
