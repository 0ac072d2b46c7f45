"""Compare a checkpoint's hashes when Megatron loads it, once and with threads.

Megatron refuses a checkpoint without hashes, which those of earlier releases and other tools lack,
and hashes once more what has been compared before anything was built.
"""

from collections.abc import Callable
from pathlib import Path

from kvshift_megatron.checks import integrity
from kvshift_megatron.upstream import faults_table, substitutions
from kvshift_megatron.utils.ranks import on_rank_0

_installed = False


def install() -> None:
    """Replace Megatron's comparison, once per process."""
    global _installed
    if not _installed:
        _installed = True
        substitutions.apply(faults_table.comparison(_comparing))


def _comparing(_: Callable) -> Callable[[str], None]:
    return compare


def compare(directory: str) -> None:
    """Raise on every rank unless the files are as they were saved; collective over all ranks.

    Args:
        directory: The folder of one iteration. Without hashes it passes.

    Raises:
        ValueError: A file is not what was saved.
    """
    folder = Path(directory)

    def ask() -> str | None:
        return integrity.difference(folder) if integrity.has_manifest(folder) else None

    fault = on_rank_0(ask)
    if fault is not None:
        raise ValueError(f"load: {fault}: copy it again, or set --ckpt-step to another iteration")
