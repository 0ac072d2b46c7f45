"""Compare the global shapes of a checkpoint's tensors with those of the built model."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.utils import unwrap_model

from kvshift_megatron.checks.stored_files import StoredModel
from kvshift_megatron.utils.ranks import of_all_ranks

_LAYER = re.compile(r"^(.*?\blayers)\.(\d+)\.")
_REMEDY = (
    "build the model with the sizes that it was trained with (--num-layers, --hidden-size, "
    "--ffn-hidden-size, --num-query-groups, --num-experts and the like; for a hybrid model "
    "--hybrid-layer-pattern), or load another checkpoint"
)


def compare_shapes(
    directory: Path,
    stored: StoredModel,
    model: list[torch.nn.Module],
    may_be_missing: tuple[str, ...],
) -> None:
    """Raise on every rank unless the checkpoint holds the whole model, with its shapes.

    Collective over all ranks.

    Args:
        directory: The checkpoint's folder, for the message.
        stored: What the checkpoint holds.
        model: This rank's chunks, wrapped or not.
        may_be_missing: Beginnings of keys for which the load may leave the model as it is.

    Raises:
        ValueError: A tensor does not fit (the message has both shapes), or the checkpoint holds
            layers that the model does not have.
    """
    needed = model_shapes(model, stored.content or {})
    misfits = [
        misfit(key, stored.shapes.get(key), tensor)
        for key, tensor in sorted(needed.items())
        if key in stored.shapes or not key.startswith(may_be_missing)
    ]
    found = of_all_ranks(([text for text in misfits if text], _layers(needed)))
    texts = list(dict.fromkeys(text for misfits, _ in found for text in misfits))
    layers = {layer for _, layers in found for layer in layers}
    kinds = {kind for kind, _ in layers}
    dropped = sorted(layer for layer in _layers(stored.shapes) - layers if layer[0] in kinds)
    if texts:
        more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
        raise ValueError(f"load: the checkpoint {directory} {texts[0]}{more}: {_REMEDY}")
    if dropped:
        names = ", ".join(f"{kind}.{number}" for kind, number in dropped)
        raise ValueError(
            f"load: the checkpoint {directory} holds layers that the model does not have and that "
            f"a load would drop ({names}): {_REMEDY}"
        )


def misfit(key: str, stored: tuple[int, ...] | None, needed: ShardedTensor) -> str | None:
    """Return what is wrong with a tensor, as the end of "the checkpoint ...", or None."""
    shape = tuple(needed.global_shape)
    if stored is None:
        return f"does not hold {key}, which the model needs with the global shape {list(shape)}"
    # The padding of the vocabulary depends on the tensor-parallel size.
    skip = 1 if needed.allow_shape_mismatch else 0
    if stored[skip:] == shape[skip:] and len(stored) == len(shape):
        return None
    return f"holds {key} with the global shape {list(stored)}, and the model needs {list(shape)}"


def model_shapes(model: list[torch.nn.Module], content: dict[str, Any]) -> dict[str, ShardedTensor]:
    """Return the tensors that this rank asks a checkpoint for, by key.

    Args:
        model: This rank's chunks.
        content: How the checkpoint was saved, as Megatron noted in it.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    tensors: dict[str, ShardedTensor] = {}
    for chunk in model:
        sharded = unwrap_model(chunk).sharded_state_dict(metadata={**content, "dp_cp_group": group})
        # Some tensors, such as gated projections, are stored in parts of one key.
        apply_factories(sharded)
        tensors |= {t.key: t for t in nested_values(sharded) if isinstance(t, ShardedTensor)}
    return tensors


def _layers(keys: Iterable[str]) -> set[tuple[str, int]]:
    """Return {("decoder.layers", 3), ...} for the keys with a layer's number."""
    matches = (_LAYER.match(key) for key in keys)
    return {(match.group(1), int(match.group(2))) for match in matches if match}
