"""Write a torch_dist checkpoint one tensor at a time; Megatron loads it at any parallel layout.

PyTorch's distributed checkpoint writer asks for each piece just before it writes it. This needs no
rank, process group or model.
"""

import io
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from kvshift_megatron.checks.checkpoint_paths import RELEASE, TRACKER, iteration_folder
from kvshift_megatron.checks.integrity import write_manifest

# Weights without training state: Megatron starts at step 0 with a new optimizer.
ITERATION = RELEASE


@dataclass(frozen=True)
class Piece:
    """One stored tensor, or one layer of it.

    Args:
        key: Key in the checkpoint.
        shape: Shape of this piece, without the axis of layers.
        dtype: Dtype of this piece.
        read: Produces the tensor just before it is written.
        layer, num_layers: Place along a first axis of layers; None if layers are not stacked.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    layer: int | None = None
    num_layers: int | None = None


@dataclass(frozen=True)
class Content:
    """A whole checkpoint.

    Args:
        pieces: All tensors, in the order in which they are read and written.
        objects: Key -> produces what is stored under it besides tensors.
        common: Megatron's common state, for a file of its own; None if it is among the objects.
    """

    pieces: list[Piece]
    objects: dict[str, Callable[[], bytes]]
    common: dict[str, Any] | None


def write_torch_dist(
    root: Path, pieces: list[Piece], extra_states: list[str], arguments: Namespace
) -> None:
    """Write a checkpoint of weights below `root`, with Megatron's tracker file.

    Args:
        root: An existing, empty folder, for Megatron's --load.
        pieces: All tensors.
        extra_states: Keys of the empty states that layers ask for.
        arguments: Megatron's arguments, plain values only.

    Raises:
        OSError: The file system reports an error, such as a full disk.
    """
    objects = dict.fromkeys(extra_states, empty_extra_state)
    write_checkpoint(root, ITERATION, Content(pieces, objects, _common_state(arguments)))


def write_checkpoint(root: Path, iteration: int | str, content: Content) -> None:
    """Write a checkpoint below `root`, with Megatron's tracker file.

    Megatron 0.19 compares the hashes that are written last; earlier releases ignore them.

    Args:
        root: An existing, empty folder, for Megatron's --load.
        iteration: Number of steps, or "release".
        content: What to write; its tensors are read one at a time.

    Raises:
        OSError: The file system reports an error, such as a full disk.
    """
    folder = iteration_folder(root, iteration)
    try:
        _write(folder, content)
    except RuntimeError as error:
        # torch.save wraps the file system's error in one of its own.
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise cause from error
        raise
    (root / TRACKER).write_text(str(iteration))


def empty_extra_state() -> bytes:
    """Return the state of a layer that has none besides its weights."""
    return stored_object(torch.empty(0, dtype=torch.uint8))


def stored_object(value: Any) -> bytes:
    """Return an object as Megatron stores it under a key of its own."""
    buffer = io.BytesIO()
    torch.save([value], buffer)
    return buffer.getvalue()


def _write(folder: Path, content: Content) -> None:
    folder.mkdir()
    items = [_write_item(piece) for piece in content.pieces]
    pieces = {item.index: piece for item, piece in zip(items, content.pieces)}
    planner = _OneByOne(pieces, content.objects)
    items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in content.objects]
    writer = FileSystemWriter(folder, thread_count=1)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = create_default_global_save_plan(
        [writer.prepare_local_plan(SavePlan(items))], rewrite_index_hints=False
    )
    (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])
    if content.common is not None:
        # Releases from 0.17 on read this file; 0.19 writes the same data as one more object.
        torch.save(content.common, folder / "common.pt")
    (folder / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    write_manifest(folder)


def _common_state(arguments: Namespace) -> dict:
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0.0,
        # The layout in which Megatron asks this checkpoint for its tensors.
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _write_item(piece: Piece) -> WriteItem:
    sizes, offsets, whole = list(piece.shape), [0] * len(piece.shape), list(piece.shape)
    if piece.layer is not None and piece.num_layers is not None:
        sizes, offsets, whole = [1, *sizes], [piece.layer, *offsets], [piece.num_layers, *whole]
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
        properties=TensorProperties(dtype=piece.dtype),
        size=torch.Size(whole),
    )
    index = MetadataIndex(piece.key, torch.Size(offsets))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


class _OneByOne(SavePlanner):
    """Produce each piece when the writer asks for it, and free the previous one."""

    def __init__(self, pieces: dict[MetadataIndex, Piece], objects: dict[str, Callable[[], bytes]]):
        self._pieces, self._objects = pieces, objects
        self._last: Tensor | None = None

    # The writer is given its plan, so it asks the planner for none.
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> Any: ...

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any: ...

    def finish_plan(self, new_plan: SavePlan) -> Any: ...

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn]())
        if self._last is not None:
            # The writer keeps a reference to the last tensor of every key: these would add up.
            self._last.untyped_storage().resize_(0)
        piece = self._pieces[write_item.index]
        tensor = piece.read()
        assert tensor.shape == piece.shape and tensor.dtype == piece.dtype, piece.key
        assert write_item.tensor_data is not None  # every item but BYTE_IO has it
        tensor = tensor.reshape(write_item.tensor_data.chunk.sizes).contiguous()
        storage = tensor.untyped_storage()
        if storage.size() != tensor.nbytes or not storage.resizable():
            tensor = tensor.clone()
        self._last = tensor
        return tensor
