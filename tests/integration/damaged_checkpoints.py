"""Damaged copies of a checkpoint; source and target are folders as for --save and --load."""

import shutil
from pathlib import Path

_SHARD = "iter_0000002/__1_0.distcp"
_METADATA = "iter_0000002/.metadata"


def without_a_shard(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    (target / _SHARD).unlink()


def with_a_short_shard(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    _cut(target / _SHARD)


def with_a_flipped_bit(source: Path, target: Path) -> None:
    """Change one bit among the numbers of a tensor."""
    shutil.copytree(source, target)
    content = bytearray((target / _SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (target / _SHARD).write_bytes(content)


def without_metadata(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    (target / _METADATA).unlink()


def with_short_metadata(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    _cut(target / _METADATA)


def _cut(file: Path) -> None:
    """Remove the last tenth."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 9 // 10])
