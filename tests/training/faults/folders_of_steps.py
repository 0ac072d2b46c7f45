"""Real checkpoints of three steps, to be damaged."""

from pathlib import Path

import torch

from kvshift_megatron.checks.checkpoint_paths import TRACKER

STEPS = (2, 4, 6)


def save(directory: Path) -> None:
    """Save a checkpoint as Megatron does, with its hashes and its two descriptions written last."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    directory.mkdir(parents=True)
    weight = ShardedTensor.from_rank_offsets("decoder.weight", torch.arange(64.0))
    state = {"weight": weight, "iteration": 2}
    dist_checkpointing.save(state, str(directory), verify_integrity=True)


def save_all(root: Path) -> None:
    """Save iter_0000002, 4 and 6, all complete."""
    for step in STEPS:
        save(root / f"iter_{step:07d}")
    (root / TRACKER).write_text("6")


def shard(root: Path, step: int) -> Path:
    return root / f"iter_{step:07d}" / "__0_0.distcp"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip(file: Path) -> None:
    """Change one bit in the middle, which keeps the length."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def unlink_all(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
