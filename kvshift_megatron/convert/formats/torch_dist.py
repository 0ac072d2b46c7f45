"""Read Megatron's torch_dist checkpoints tensor by tensor, without ranks or a process group.

PyTorch's distributed checkpoint reader reads the tensors, whatever parallel layout saved them. If
Megatron stacks the layers, it reads one layer's slice at a time.
"""

import io
import pickle
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from kvshift_megatron.checks import integrity
from kvshift_megatron.checks.checkpoint_paths import (
    RELEASE,
    TRACKER,
    iteration_folder,
    read_tracker,
)
from kvshift_megatron.checks.model_forms import form_of, hybrid_key
from kvshift_megatron.convert.formats.dcp_metadata import first_line, read_metadata
from kvshift_megatron.convert.formats.safetensors_header import DTYPES
from kvshift_megatron.utils import inert_pickle

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.(.*)$")
COMMON_KEY = "common_state/shard_0_1"
# Keys that are not weights. All others have to be in the name map, or are refused.
_NO_WEIGHT = re.compile(
    r"^(optimizer|opt_param_scheduler|rng_state|rerun_state_machine|common_state|chained_\d+)"
    r"|_extra_state"
)


def find_checkpoint(path: Path) -> Path:
    """Find the folder of one iteration: `path` itself, or the one that the tracker file names.

    Raises:
        ValueError: There is none, or it has another format; the message says what to do.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    tracker, name = path / TRACKER, read_tracker(path)
    if name is not None:
        if name != RELEASE and not name.isdigit():
            raise ValueError(
                f"{tracker} says {name!r}, which is neither a number of steps nor 'release': give "
                "the folder of an iteration instead"
            )
        path = iteration_folder(path, name)
        if not path.is_dir():
            raise ValueError(f"{tracker} names {path.name}, but that folder is missing beside it")
    if (path / ".metadata").is_file():
        return path
    if any(path.glob("mp_rank_*")):
        raise ValueError(
            f"{path} is in Megatron's older 'torch' format: load it in Megatron with the parallel "
            "layout that saved it, and save it again with --ckpt-format torch_dist"
        )
    raise ValueError(
        f"{path} is not a torch_dist checkpoint (it has no .metadata file): give a folder that "
        "Megatron saved, or one iteration in it"
    )


def split_layer(name: str) -> tuple[int | None, str]:
    """Split a name into its layer's number (None without one) and the key of stacked layers."""
    match = _LAYER.match(name)
    return (int(match[2]), match[1] + match[3]) if match else (None, name)


class Location(NamedTuple):
    """Where one tensor is in a checkpoint.

    Args:
        keys: Its stored keys; several, in order, if its parts are stored separately.
        layer: Index along the first axis of the stored tensor; None if layers are not stacked.
        shape: Shape of the tensor itself.
    """

    keys: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


class TorchDistReader:
    """One torch_dist checkpoint: its arguments, and its tensors by name.

    Names contain the layer's number (`decoder.layers.3....`), no matter whether the checkpoint
    numbers or stacks its layers, and stores SwiGLU's halves and the experts together or separately.
    They are those of a GPT model even if the checkpoint is of a hybrid model of the same layers.

    Args:
        path: The checkpoint's folder, or its parent with Megatron's tracker file.

    Raises:
        ValueError: There is no such checkpoint, or it cannot be read; the message names the file.
    """

    def __init__(self, path: Path):
        self.path = find_checkpoint(Path(path))
        self._reader = FileSystemReader(self.path)
        self._metadata = read_metadata(self.path / ".metadata")
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _NO_WEIGHT.search(key)
        }
        self.form = form_of(self._tensors)  # of its model; None if its keys do not tell
        for key, entry in self._tensors.items():
            if entry.properties.dtype not in DTYPES.values():
                raise ValueError(
                    f"{self.path}: {key!r} has dtype {entry.properties.dtype}, but only "
                    f"{', '.join(map(str, DTYPES.values()))} can be converted"
                )

    def compare_hashes(self) -> None:
        """Compare all files with the hashes that were written when they were saved.

        Say so on standard error if there are none, as in checkpoints of earlier releases.

        Raises:
            ValueError: A file is not what was saved; the message names it.
        """
        if not integrity.has_manifest(self.path):
            print(
                f"kvshift-convert: note: {self.path} has no {integrity.MANIFEST}, so a bit that "
                "changed since it was saved would not be noticed",
                file=sys.stderr,
            )
        elif (fault := integrity.difference(self.path)) is not None:
            raise ValueError(
                f"{fault}: copy it again, or convert it as it is with --no-verify-integrity"
            )

    def weights(self) -> set[str]:
        """Return the stored keys of all weights."""
        return set(self._tensors)

    def locate(self, name: str) -> Location | None:
        """Find where a tensor is stored; return None if it is not."""
        found = self._locate_one(name)
        prefix, separator, suffix = name.partition(".experts.experts.")
        if found is not None or not separator:
            return found
        experts: list[Location] = []
        while found := self._locate_one(f"{prefix}{separator}{len(experts)}.{suffix}"):
            experts.append(found)
        if not experts:
            return None
        keys = tuple(key for expert in experts for key in expert.keys)
        return Location(keys, None, (len(experts), *experts[0].shape))

    def _locate_one(self, name: str) -> Location | None:
        if self.form == "hybrid":
            name = hybrid_key(name)
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

    def dtype(self, location: Location) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return self._tensors[location.keys[0]].properties.dtype

    def dtypes(self) -> set[torch.dtype]:
        """Return the stored dtypes of all weights."""
        return {entry.properties.dtype for entry in self._tensors.values()}

    def num_layers(self) -> int:
        """Count the layers of the GPT model, stacked or by numbers in names."""
        stacked = self._tensors.get("decoder.layers.self_attention.linear_proj.weight")
        if stacked is not None:
            return stacked.size[0]
        layers = {int(match[2]) for match in map(_LAYER.match, self._tensors) if match}
        count = max(layers, default=-1) + 1
        return -(-count // 2) if self.form == "hybrid" else count

    def read(self, location: Location) -> Tensor:
        """Read one whole tensor to the CPU, in its stored dtype and in its own memory.

        Raises:
            ValueError: A file is missing or damaged; the message names the folder and the key.
        """
        parts = [self.read_stored(key, location.layer) for key in location.keys]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(location.shape)

    def stored(self) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
        """Return everything that is stored, by key; not only weights."""
        return dict(self._metadata.state_dict_metadata)

    def read_stored(self, key: str, layer: int | None = None) -> Tensor:
        """Read a stored tensor to the CPU, or the part of it at `layer` of its first axis.

        Raises:
            ValueError: As for `read`.
        """
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), key
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        covered = sum(item.lengths.numel() for item in items)
        if _overlap(items):
            raise ValueError(
                f"{self.path}: shards of {key} overlap: .metadata is damaged, copy it again"
            )
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        if covered != target.numel():
            raise ValueError(
                f"{self.path}: the shards of {key} hold {covered} of its {target.numel()} elements:"
                " the checkpoint is incomplete"
            )
        self._read_data(key, items, _IntoTensor(target))
        return target if layer is None else target[0]

    def _read_data(self, key: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.path}: the file {Path(error.filename).name} of {key} is missing: copy the "
                "checkpoint again with all its files"
            ) from error
        except OSError:
            raise
        # A damaged file can raise anything.
        except Exception as error:
            raise ValueError(
                f"{self.path}: {key} cannot be read: a .distcp file is truncated or damaged "
                f"({first_line(error)})"
            ) from error

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def arguments(self) -> Namespace:
        """Read Megatron's training arguments; values of Megatron's own classes are inert.

        Raises:
            ValueError: There are none, or they hold something that is not plain data.
        """
        common = self._common(inert_pickle.load_common)
        arguments = common.get("args") if isinstance(common, dict) else None
        if not isinstance(arguments, Namespace):
            raise ValueError(
                f"{self.path}: the checkpoint does not hold Megatron's arguments, which say what "
                "its tensors mean: save it with Megatron's training loop"
            )
        return arguments

    def _common(self, load: Callable[[Path | io.BytesIO, str], Any]) -> Any:
        """Read the common state by a function that takes it and its name; {} if there is none."""
        file = self.path / "common.pt"
        if file.is_file():
            return load(file, str(file))
        if COMMON_KEY not in self._metadata.state_dict_metadata:
            return {}
        # megatron-core 0.19 stores it as one more shard.
        shard = load(self.read_object(COMMON_KEY), f"{COMMON_KEY} of {self.path}")
        return shard[0] if isinstance(shard, list) and shard else {}

    def common_state(self) -> dict[str, Any]:
        """Read what Megatron stores once: its arguments, the iteration, the schedule and more.

        Values of the classes that Megatron itself reads from checkpoints are what they were; this
        imports Megatron.

        Raises:
            ValueError: It holds anything else, or no arguments.
        """
        self.arguments()  # refuses what is damaged or not plain
        from megatron.core.safe_globals import SAFE_GLOBALS

        def load(source: Path | io.BytesIO, name: str) -> Any:
            try:
                with inert_pickle.allowed(SAFE_GLOBALS):
                    return torch.load(source, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"{name} holds objects that Megatron does not save: nothing of it was run"
                ) from error

        return self._common(load)

    def read_object(self, key: str) -> io.BytesIO:
        """Read what is stored under a key that is no tensor's, as it is.

        Raises:
            ValueError: As for `read`.
        """
        entry = self._metadata.state_dict_metadata[key]
        planner = _IntoBytes()
        self._read_data(key, _byte_items(key, entry), planner)
        return planner.stream


def _overlap(items: list[ReadItem]) -> bool:
    """Return whether two pieces go to the same part of the target."""
    boxes = sorted((tuple(item.dest_offsets), tuple(item.lengths)) for item in items)
    for i, (start, length) in enumerate(boxes):
        for other, other_length in boxes[i + 1 :]:
            if not start or other[0] >= start[0] + length[0]:
                break
            if all(
                a < b + m and b < a + n for a, n, b, m in zip(start, length, other, other_length)
            ):
                return True
    return False


class _IntoTensor(LoadPlanner):
    """Give the reader the part of the target tensor that each piece belongs to."""

    def __init__(self, target: Tensor):
        self.target = target

    # The reader is given its plan, so it asks the planner for none.
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> Any: ...

    def create_global_plan(self, global_plan: list[LoadPlan]) -> Any: ...

    def finish_plan(self, central_plan: LoadPlan) -> Any: ...

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None: ...

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


class _IntoBytes(_IntoTensor):
    def __init__(self) -> None:
        self.stream = io.BytesIO()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.stream = value


def _byte_items(key: str, entry: Any) -> list[ReadItem]:
    planner = DefaultLoadPlanner()
    planner.set_up_planner({key: io.BytesIO()}, Metadata({key: entry}), is_coordinator=True)
    return planner.create_local_plan().items
