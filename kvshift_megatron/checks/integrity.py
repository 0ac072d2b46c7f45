"""Hashes of a checkpoint's files: written once they are complete, compared before they are loaded.

The file is Megatron's own (`--verify-integrity`, from 0.19 on), byte for byte, so that either side
compares what the other wrote. Megatron hashes one file after the other; here threads share them.

Imports neither Megatron nor torch.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "integrity.json"
_ALGORITHM = "sha256"
_MOST_THREADS = 16
# What `difference` has found, by the state of the files: the same is asked more than once.
_found: dict[tuple, str | None] = {}


def write_manifest(directory: str | Path) -> None:
    """Hash every file in a checkpoint's folder, and write the hashes beside them.

    Raises:
        OSError: A file cannot be read, or the hashes cannot be written.
    """
    directory = Path(directory)
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != MANIFEST)
    content = {"algorithm": _ALGORITHM, "files": _hashes(files)}
    (directory / MANIFEST).write_text(json.dumps(content, indent=2))


def has_manifest(directory: Path) -> bool:
    """Return whether the hashes of a checkpoint's files were written."""
    return (directory / MANIFEST).exists()


def difference(directory: Path) -> str | None:
    """Return what is not as it was saved, in words; None if every file is.

    Ask again at no cost as long as no file has changed.

    Args:
        directory: A checkpoint's folder, with a manifest.

    Raises:
        OSError: The file system failed.
    """
    states = ((path.name, path.stat()) for path in sorted(directory.iterdir()))
    state = tuple((n, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in states)
    if (directory, state) not in _found:
        _found[directory, state] = _difference(directory)
    return _found[directory, state]


def _difference(directory: Path) -> str | None:
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        algorithm, expected = content["algorithm"], dict(content["files"])
        if algorithm != _ALGORITHM:
            raise ValueError(f"it holds hashes of the kind {algorithm!r}")
        if not all(isinstance(text, str) for pair in expected.items() for text in pair):
            raise ValueError("its entries are no hashes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} of the checkpoint {directory} cannot be read ({error})"
    there = {path.name: path for path in directory.iterdir() if path.is_file()}
    unlisted = sorted(name for name in there if name.endswith(".distcp") and name not in expected)
    if unlisted:
        return f"{MANIFEST} of the checkpoint {directory} does not list its file {unlisted[0]}"
    missing = sorted(expected.keys() - there.keys())
    if missing:
        return f"the file {missing[0]} of the checkpoint {directory} is missing"
    found = _hashes([there[name] for name in sorted(expected)])
    others = [name for name, text in found.items() if text != expected[name]]
    if not others:
        return None
    more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    return (
        f"the content of the file {others[0]}{more} of the checkpoint {directory} is not what was "
        f"saved (its hash is not the one in {MANIFEST})"
    )


def _hashes(files: list[Path]) -> dict[str, str]:
    """Return the hash of each file by name, in the given order; a thread per core shares them."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip((file.name for file in files), pool.map(_hash, files)))


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, _ALGORITHM).hexdigest()
