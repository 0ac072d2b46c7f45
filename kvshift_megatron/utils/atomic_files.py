"""Write files so that they appear complete under their name, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside `path`, then rename it to `path`.

    Args:
        path: The file to create or replace.
        write: Called with the temporary path.

    Raises:
        OSError: Writing or renaming failed; the file at `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
