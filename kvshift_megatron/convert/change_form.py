"""Change the form of a training checkpoint: Megatron's GPT model, or its hybrid model.

Weights, optimizer state, random states and everything else go along, to the bit. Megatron's own
arguments in it are those that the other model would have saved.
"""

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kvshift_megatron.checks.checkpoint_paths import RELEASE
from kvshift_megatron.checks.model_forms import NAMES, Form, pattern_of
from kvshift_megatron.convert.form_keys import HYBRID_ONLY, Stored, Thing, named, things
from kvshift_megatron.convert.formats.output import (
    WriteProgress,
    check_free_space,
    check_target,
    complete_or_absent,
)
from kvshift_megatron.convert.formats.tokenizer_files import SUBFOLDER
from kvshift_megatron.convert.formats.torch_dist import COMMON_KEY, TorchDistReader
from kvshift_megatron.convert.formats.torch_dist_writer import (
    Content,
    Piece,
    empty_extra_state,
    stored_object,
    write_checkpoint,
)
from kvshift_megatron.convert.hybrid_arguments import NOT_IN_HYBRID, hybrid_layers, take_form

# The distributed optimizer's format in which each parameter has its own tensors.
_BY_PARAMETER = "fully_reshardable"
_PARAMETER_STATE = re.compile(r"^(chained_\d+\.)?optimizer\.state\.")
# How a checkpoint says that a GPT model looks for its layers one by one.
_NUMBERED = ("singleton_local_shards", "non_homogeneous_layers")
# Arguments that the other form does not honour unless they have one of these values.
_REQUIRED = {
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (None, False),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "use_layer_wise_distributed_optimizer": (None, False),
    # By the number of a layer, which is another one in the other form.
    "no_rope_freq": (None,),
    "window_attn_skip_freq": (None,),
    **NOT_IN_HYBRID,
}


@dataclass(frozen=True)
class ChangeForm:
    """What to convert and how.

    Args:
        source: Megatron's checkpoint: the folder of --save, or one iteration in it.
        target: The folder to create, for Megatron's --load; it gets the same iteration.
        form: Of the target.
        overwrite: Replace an existing target.
        progress: Report progress on standard error.
        verify_integrity: Compare the source's files with their hashes before anything is written.
    """

    source: Path
    target: Path
    form: Form
    overwrite: bool = False
    progress: bool = False
    verify_integrity: bool = True


def change_form(job: ChangeForm) -> str:
    """Convert a checkpoint, with one tensor of one layer in memory at a time.

    Returns:
        The hybrid layer pattern of the model, in whichever form it is written.

    Raises:
        ValueError: The source cannot be converted; nothing is written.
        OSError: The file system reports an error; nothing is left at the target.
    """
    check_target(job.target, [job.source], job.overwrite)
    reader = TorchDistReader(job.source)
    check_target(job.target, [reader.path.parent / SUBFOLDER], job.overwrite)
    num_layers, has_experts = _layers(reader, job.form)
    common = reader.common_state()
    how_saved = common.get("content_metadata") or {}
    _check_optimizer(reader, how_saved)
    pattern = pattern_of(num_layers, has_experts)
    take_form(common["args"], job.form, num_layers, has_experts)
    stacked = None if any(how_saved.get(name) for name in _NUMBERED) else num_layers
    pieces, objects = _renamed(reader, job.form, stacked)
    total = sum(math.prod(piece.shape) * piece.dtype.itemsize for piece in pieces)
    check_free_space(job.target, total)
    if job.verify_integrity:
        reader.compare_hashes()
    progress = WriteProgress(total, job.progress)
    iteration = RELEASE if reader.path.name == RELEASE else int(common["iteration"])
    counted = [replace(piece, read=partial(_counted, piece.read, progress)) for piece in pieces]
    content = Content(counted, objects, common)
    if COMMON_KEY in objects:
        content = Content(counted, {**objects, COMMON_KEY: partial(stored_object, common)}, None)
    with complete_or_absent(job.target) as folder:
        write_checkpoint(folder, iteration, content)
        if (tokenizer := reader.path.parent / SUBFOLDER).is_dir():
            shutil.copytree(tokenizer, folder / SUBFOLDER)
    return pattern


def _counted(read: Callable[[], Tensor], progress: WriteProgress) -> Tensor:
    tensor = read()
    progress.add(tensor.nbytes)
    return tensor


def _layers(reader: TorchDistReader, form: Form) -> tuple[int, bool]:
    """Return the number of layers of the GPT model in a checkpoint, and whether they have experts.

    Args:
        reader: The checkpoint.
        form: That it will get.

    Raises:
        ValueError: It has that form already, or the other form cannot hold it.
    """
    theirs, arguments = reader.form, reader.arguments()
    if theirs is None:
        raise ValueError(f"{reader.path} holds neither {NAMES['gpt']} nor {NAMES['hybrid']}")
    if theirs == form:
        raise ValueError(f"{reader.path} is of {NAMES[form]} already: set the other --model-form")
    for name, allowed in _REQUIRED.items():
        value = getattr(arguments, name, None)
        if value not in allowed:
            raise ValueError(
                f"{reader.path}: the model was trained with {name}={value!r}, which Megatron's GPT "
                "and hybrid models do not have alike: its form cannot be changed"
            )
    if theirs == "hybrid":
        return hybrid_layers(arguments, reader.weights(), reader.path)
    experts = bool(getattr(arguments, "num_experts", None))
    frequency = getattr(arguments, "moe_layer_freq", 1)
    if experts and frequency != 1:
        raise ValueError(
            f"{reader.path}: the model was trained with moe_layer_freq={frequency!r}: the form of "
            "a model can be changed if all of its layers have experts, or none"
        )
    said, found = getattr(arguments, "num_layers", None), reader.num_layers()
    if said != found:
        raise ValueError(
            f"{reader.path} holds {found} layers, but its arguments say num_layers={said}: they "
            "are not of the same model"
        )
    return found, experts


def _check_optimizer(reader: TorchDistReader, how_saved: dict[str, Any]) -> None:
    sharding = how_saved.get("distrib_optim_sharding_type")
    others = (
        key for key in reader.stored() if "optimizer" in key and not _PARAMETER_STATE.match(key)
    )
    other = next(others, None)
    if sharding not in (None, _BY_PARAMETER) or other is not None:
        raise ValueError(
            f"{reader.path}: its optimizer state has the format {sharding or other}, in which the "
            "tensors of parameters cannot be told apart: load it with the flags that it was saved "
            "with and --dist-ckpt-optim-fully-reshardable, and convert the next checkpoint"
        )


def _renamed(
    reader: TorchDistReader, form: Form, stacked: int | None
) -> tuple[list[Piece], dict[str, Callable[[], bytes]]]:
    """Return everything to write, as `Content` has it.

    Args:
        reader: The checkpoint, of the other form.
        form: To write.
        stacked: Number of layers, if a GPT model stacks them; else None.

    Raises:
        ValueError: Something has no place in the other form.
    """
    theirs: Form = "gpt" if form == "hybrid" else "hybrid"
    pieces: list[Piece] = []
    objects: dict[str, Callable[[], bytes]] = {}
    for key, entry in sorted(reader.stored().items()):
        if key == HYBRID_ONLY:
            continue
        size = entry.size if isinstance(entry, TensorStorageMetadata) else None
        for source, thing in _things(reader, key, size[0] if size else None, theirs):
            target = named(thing, form, stacked, size is None)
            if not isinstance(entry, TensorStorageMetadata):
                objects[target.key] = partial(_object, reader, source.key)
                continue
            shape = tuple(entry.size if source.layer is None else entry.size[1:])
            read = partial(reader.read_stored, *source)
            dtype = entry.properties.dtype
            num_stacked = None if target.layer is None else stacked
            pieces.append(Piece(target.key, shape, dtype, read, target.layer, num_stacked))
    if form == "hybrid":
        objects[HYBRID_ONLY] = empty_extra_state
    return pieces, objects


def _things(
    reader: TorchDistReader, key: str, num_stacked: int | None, form: Form
) -> list[tuple[Stored, Thing]]:
    try:
        return list(things(key, num_stacked, form))
    except ValueError as error:
        raise ValueError(f"{reader.path}: {error}: its form cannot be changed") from error


def _object(reader: TorchDistReader, key: str) -> bytes:
    return reader.read_object(key).getvalue()
