"""Writing a torch_dist checkpoint that Megatron loads at any layout, one tensor at a time.

PyTorch's distributed checkpoint writer asks for each piece when it is about to write it; no rank,
process group or model is needed.
"""

import io
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from kvshift_megatron.checks.checkpoint_paths import RELEASE, TRACKER

# Weights without a training state: Megatron then starts at step 0 with a new optimizer.
ITERATION = RELEASE


@dataclass(frozen=True)
class Piece:
    """One stored tensor, or one layer of it.

    Args:
        key: its key in the checkpoint.
        shape: of this piece, without the layers' axis.
        dtype: of this piece.
        layer, num_layers: its place along a first axis of layers; None for a tensor on its own.
        read: makes it, when its turn has come.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    layer: int | None = None
    num_layers: int | None = None


def write_torch_dist(
    root: Path, pieces: list[Piece], extra_states: list[str], arguments: Namespace
) -> None:
    """Write a checkpoint below `root`, with Megatron's tracker file, in the order of `pieces`.

    Args:
        root: an existing, empty folder, for Megatron's --load.
        pieces: everything that is a tensor.
        extra_states: keys of the empty states that linear layers ask for.
        arguments: Megatron's, plain values only.

    Raises:
        OSError: as the file system has it, such as a full disk.
    """
    try:
        _write(root, pieces, extra_states, arguments)
    except RuntimeError as error:
        # torch.save hides why a file could not be written behind one of its own.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise cause from error
        raise


def _write(root: Path, pieces: list[Piece], extra_states: list[str], arguments: Namespace) -> None:
    folder = root / ITERATION
    folder.mkdir()
    items = [_write_item(piece) for piece in pieces]
    planner = _OneByOne({item.index: piece for item, piece in zip(items, pieces)})
    items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in extra_states]
    writer = FileSystemWriter(folder, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = create_default_global_save_plan(
        [writer.prepare_local_plan(SavePlan(items))], rewrite_index_hints=False
    )
    (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])
    # Releases from 0.17 on read it; 0.19 writes the same data as one more shard.
    torch.save(_common_state(arguments), folder / "common.pt")
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (root / TRACKER).write_text(ITERATION)


def _common_state(arguments: Namespace) -> dict:
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0.0,
        # How Megatron lays out what it asks this checkpoint for.
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _write_item(piece: Piece) -> WriteItem:
    sizes, offsets, whole = list(piece.shape), [0] * len(piece.shape), list(piece.shape)
    if piece.layer is not None:
        sizes, offsets, whole = [1, *sizes], [piece.layer, *offsets], [piece.num_layers, *whole]
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
        properties=TensorProperties(dtype=piece.dtype),
        size=torch.Size(whole),
    )
    index = MetadataIndex(piece.key, torch.Size(offsets))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


class _OneByOne(SavePlanner):
    """Makes each piece when the writer asks for it, and lets go of the one before."""

    def __init__(self, pieces: dict[MetadataIndex, Piece]):
        self._pieces = pieces
        self._last: Tensor | None = None
        buffer = io.BytesIO()
        torch.save([torch.empty(0, dtype=torch.uint8)], buffer)
        self._extra_state = buffer.getvalue()

    def set_up_planner(self, *args, **kwargs): ...

    def create_local_plan(self): ...

    def create_global_plan(self, all_plans): ...

    def finish_plan(self, new_plan): ...

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._extra_state)
        if self._last is not None:
            # The writer keeps a reference to the last tensor of every key, which would add up.
            self._last.untyped_storage().resize_(0)
        piece = self._pieces[write_item.index]
        tensor = piece.read()
        assert tensor.shape == piece.shape and tensor.dtype == piece.dtype, piece.key
        tensor = tensor.reshape(write_item.tensor_data.chunk.sizes).contiguous()
        storage = tensor.untyped_storage()
        if storage.size() != tensor.nbytes or not storage.resizable():
            tensor = tensor.clone()
        self._last = tensor
        return tensor
