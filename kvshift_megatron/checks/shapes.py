"""Is a checkpoint of the model that was built? Its global shapes, against the model's own."""

import re
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

from kvshift_megatron.checks.stored_files import StoredModel

_LAYER = re.compile(r"^(.*?\blayers)\.(\d+)\.")
_REMEDY = (
    "build the model with the sizes that it was trained with (--num-layers, --hidden-size, "
    "--ffn-hidden-size, --num-query-groups, --num-experts and the like), or load another checkpoint"
)


def compare_shapes(
    directory: Path, stored: StoredModel, model: list[torch.nn.Module], may_lack_keys: bool
) -> None:
    """Raise on every rank alike unless all of the model is in the checkpoint, with its shapes.

    Collective over all ranks.

    Args:
        directory: of the checkpoint, for the message.
        stored: what it holds.
        model: this rank's chunks, wrapped or not.
        may_lack_keys: whether the load may leave parts of the model as they are.

    Raises:
        ValueError: the first tensor that does not fit, with both shapes; or layers that the model
            does not have, and that a load would drop.
    """
    needed = model_shapes(model, stored.content)
    misfits = [
        misfit(key, stored.shapes.get(key), tensor)
        for key, tensor in sorted(needed.items())
        if key in stored.shapes or not may_lack_keys
    ]
    found = [None] * torch.distributed.get_world_size()
    mine = [text for text in misfits if text], _layers(needed)
    torch.distributed.all_gather_object(found, mine)
    texts = list(dict.fromkeys(text for misfits, _ in found for text in misfits))
    layers = set().union(*(layers for _, layers in found))
    dropped = _layers(stored.shapes) - layers
    kinds = {kind for kind, _ in layers}
    dropped = sorted((kind, number) for kind, number in dropped if kind in kinds)
    if texts:
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        raise ValueError(f"load: the checkpoint {directory} {texts[0]}{more}: {_REMEDY}")
    if dropped:
        names = ", ".join(f"{kind}.{number}" for kind, number in dropped)
        raise ValueError(
            f"load: the checkpoint {directory} holds layers that the model does not have and a "
            f"load would drop ({names}): {_REMEDY}"
        )


def misfit(key: str, stored: tuple[int, ...] | None, needed: ShardedTensor) -> str | None:
    """What is wrong with a tensor, as the end of "the checkpoint ..."; None where nothing is."""
    shape = tuple(needed.global_shape)
    if stored is None:
        return f"does not hold {key}, which the model needs with the global shape {list(shape)}"
    # The padding of the vocabulary depends on the tensor-parallel size.
    skip = 1 if needed.allow_shape_mismatch else 0
    if stored[skip:] == shape[skip:] and len(stored) == len(shape):
        return None
    return f"holds {key} with the global shape {list(stored)}, and the model needs {list(shape)}"


def model_shapes(model: list[torch.nn.Module], content: dict) -> dict[str, ShardedTensor]:
    """Key -> what this rank asks a checkpoint for; parts that are no tensors are left out.

    Args:
        model: this rank's chunks.
        content: how the checkpoint was saved, as Megatron noted there.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    tensors = {}
    for chunk in model:
        sharded = unwrap_model(chunk).sharded_state_dict(metadata={**content, "dp_cp_group": group})
        # Some tensors, such as gated projections, are stored in parts of one key.
        apply_factories(sharded)
        tensors |= {t.key: t for t in nested_values(sharded) if isinstance(t, ShardedTensor)}
    return tensors


def _layers(keys) -> set[tuple[str, int]]:
    """{("decoder.layers", 3), ...} of the keys with a layer's number."""
    matches = (_LAYER.match(key) for key in keys)
    return {(match.group(1), int(match.group(2))) for match in matches if match}
