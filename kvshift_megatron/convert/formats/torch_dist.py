"""Reading Megatron's torch_dist checkpoints tensor by tensor, without ranks or a process group.

The tensors are read by PyTorch's distributed checkpoint reader, whatever parallel layout saved
them, and one layer's slice at a time where Megatron stacks the layers.
"""

import io
import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    LoadPlanner,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from kvshift_megatron.checks.checkpoint_paths import (
    RELEASE,
    TRACKER,
    iteration_folder,
    read_tracker,
)
from kvshift_megatron.convert.formats import inert_pickle

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.(.*)$")
_COMMON_KEY = "common_state/shard_0_1"
# Keys that are no weights. What is left has to be in the name map, or is refused.
_NO_WEIGHT = re.compile(
    r"^(optimizer|opt_param_scheduler|rng_state|rerun_state_machine|common_state|chained_\d+)"
    r"|_extra_state"
)


def find_checkpoint(path: Path) -> Path:
    """The folder of one iteration: `path` itself, or the newest one by Megatron's tracker file.

    Raises:
        ValueError: there is none, or it is of another format; the message says what to do.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    tracker, name = path / TRACKER, read_tracker(path)
    if name is not None:
        if name != RELEASE and not name.isdigit():
            raise ValueError(
                f"{tracker} says {name!r}, which is neither a number of steps nor 'release': name "
                "the iteration's folder itself"
            )
        path = iteration_folder(path, name)
        if not path.is_dir():
            raise ValueError(f"{tracker} names {path.name}, but that folder is missing beside it")
    if (path / ".metadata").is_file():
        return path
    if any(path.glob("mp_rank_*")):
        raise ValueError(
            f"{path} is in Megatron's older 'torch' format: load it in Megatron at its own layout "
            "and save it again with --ckpt-format torch_dist"
        )
    raise ValueError(
        f"{path} is no torch_dist checkpoint (it has no .metadata file): name a folder that "
        "Megatron saved, or one of its iterations"
    )


def split_layer(name: str) -> tuple[int | None, str]:
    """A name with a layer's number in it -> the number, and the key of all layers stacked."""
    match = _LAYER.match(name)
    return (int(match[2]), match[1] + match[3]) if match else (None, name)


class Location(NamedTuple):
    """Where one tensor is in a checkpoint.

    Args:
        keys: its stored keys; several, in their order, where its parts are stored apart.
        layer: index along the first axis of the stored tensor, where layers are stacked.
        shape: of the tensor itself.
    """

    keys: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


class TorchDistReader:
    """One torch_dist checkpoint: its arguments, and its tensors by name.

    Names have the layer's number in them (`decoder.layers.3....`), whether the checkpoint numbers
    its layers or stacks them, and whether SwiGLU's halves and the experts are stored together.

    Args:
        path: the checkpoint's folder, or the one above it with Megatron's tracker file.

    Raises:
        ValueError: no such checkpoint, or one that cannot be read; the message names the file.
    """

    def __init__(self, path: Path):
        self.path = find_checkpoint(Path(path))
        self._reader = FileSystemReader(self.path)
        self._metadata = self._read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _NO_WEIGHT.search(key)
        }

    def weights(self) -> set[str]:
        """Stored keys of all weights."""
        return set(self._tensors)

    def locate(self, name: str) -> Location | None:
        """Where a tensor is stored; None where it is not."""
        one = self._locate_one(name)
        prefix, apart, suffix = name.partition(".experts.experts.")
        if one is not None or not apart:
            return one
        experts = []
        while one := self._locate_one(f"{prefix}{apart}{len(experts)}.{suffix}"):
            experts.append(one)
        if not experts:
            return None
        keys = tuple(key for expert in experts for key in expert.keys)
        return Location(keys, None, (len(experts), *experts[0].shape))

    def _locate_one(self, name: str) -> Location | None:
        if name in self._tensors:
            return Location((name,), None, self._shape(name))
        halves = (f"{name}_w", f"{name}_v")
        if all(half in self._tensors for half in halves):
            rows, *rest = self._shape(halves[0])
            return Location(halves, None, (2 * rows, *rest))
        layer, stacked = split_layer(name)
        if layer is None or stacked not in self._tensors:
            return None
        layers, *shape = self._shape(stacked)
        return Location((stacked,), layer, tuple(shape)) if layer < layers else None

    def dtype(self, location: "Location") -> torch.dtype:
        """Stored dtype."""
        return self._tensors[location.keys[0]].properties.dtype

    def dtypes(self) -> set[torch.dtype]:
        """Stored dtypes of all weights."""
        return {entry.properties.dtype for entry in self._tensors.values()}

    def num_layers(self) -> int:
        """Layers in the checkpoint, counted by the output projections of attention."""
        stacked = self._tensors.get("decoder.layers.self_attention.linear_proj.weight")
        if stacked is not None:
            return stacked.size[0]
        layers = {int(match[2]) for match in map(_LAYER.match, self._tensors) if match}
        return max(layers, default=-1) + 1

    def read(self, location: "Location") -> Tensor:
        """One tensor, whole, on the CPU, in its stored dtype and in memory of its own.

        Raises:
            ValueError: a file is missing or damaged; the message names the folder and the key.
        """
        parts = [self._read_one(key, location.layer) for key in location.keys]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(location.shape)

    def _read_one(self, key: str, layer: int | None) -> Tensor:
        entry = self._tensors[key]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        covered = sum(item.lengths.numel() for item in items)
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        if covered != target.numel():
            raise ValueError(
                f"{self.path}: the shards of {key} hold {covered} of its {target.numel()} elements:"
                " the checkpoint is incomplete"
            )
        self._read_data(key, items, _IntoTensor(target))
        return target if layer is None else target[0]

    def _read_data(self, key: str, items: list, planner: LoadPlanner) -> None:
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.path}: the file {Path(error.filename).name} of {key} is missing: copy the "
                "checkpoint again, with all its files"
            ) from error
        except (RuntimeError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self.path}: {key} cannot be read: a .distcp file is truncated or damaged "
                f"({_first_line(error)})"
            ) from error

    def _read_metadata(self) -> Metadata:
        file = self.path / ".metadata"
        try:
            with file.open("rb") as stream:
                return inert_pickle.load_metadata(stream)
        except (EOFError, pickle.UnpicklingError, AttributeError, IndexError, KeyError) as error:
            raise ValueError(f"{file} cannot be read: {_first_line(error)}") from error

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def arguments(self) -> Namespace:
        """Megatron's training arguments as saved; values of Megatron's own classes are inert.

        Raises:
            ValueError: there are none, or they hold something that is no plain data.
        """
        file = self.path / "common.pt"
        if file.is_file():
            common = inert_pickle.load_common(file, file.name)
        elif _COMMON_KEY in self._metadata.state_dict_metadata:
            # megatron-core 0.19 keeps it as one more shard.
            common = inert_pickle.load_common(self._read_bytes(_COMMON_KEY), _COMMON_KEY)[0]
        else:
            common = {}
        arguments = common.get("args") if isinstance(common, dict) else None
        if not isinstance(arguments, Namespace):
            raise ValueError(
                f"{self.path}: the checkpoint does not hold Megatron's arguments, which say what "
                "its tensors mean: save it with Megatron's training loop"
            )
        return arguments

    def _read_bytes(self, key: str) -> io.BytesIO:
        entry = self._metadata.state_dict_metadata[key]
        planner = _IntoBytes()
        self._read_data(key, _byte_items(key, entry), planner)
        return planner.stream


class _IntoTensor(LoadPlanner):
    """Hands the reader the part of one tensor that each piece belongs to."""

    def __init__(self, target: Tensor):
        self.target = target

    def set_up_planner(self, *args, **kwargs): ...

    def create_local_plan(self): ...

    def create_global_plan(self, global_plan): ...

    def finish_plan(self, central_plan): ...

    def load_bytes(self, read_item, value): ...

    def resolve_tensor(self, read_item):
        view = self.target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item, tensor): ...


class _IntoBytes(_IntoTensor):
    def __init__(self):
        self.stream = io.BytesIO()

    def load_bytes(self, read_item, value):
        self.stream = value


def _byte_items(key, entry):
    planner = DefaultLoadPlanner()
    planner.set_up_planner({key: io.BytesIO()}, Metadata({key: entry}), is_coordinator=True)
    return planner.create_local_plan().items


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no further detail'}"
