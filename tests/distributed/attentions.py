"""The class of every attention in a model and in its baseline model."""

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.identity_op import IdentityOp

from kvshift_megatron import assert_kv_shift
from tests.distributed.canonical import canonical_name


def of_model(chunks: list[torch.nn.Module], baseline: list[torch.nn.Module]) -> dict:
    """Describe the whole model, on every rank.

    Args:
        chunks: This rank's part of the model.
        baseline: This rank's part of the baseline model.

    Returns:
        {"line": what `assert_kv_shift` says of the model, or "refusal": what it raises, "classes":
        {global name of an attention: its class}, "baseline": the same of the baseline model}.
    """
    outcome = {"classes": _classes(chunks), "baseline": _classes(baseline)}
    try:
        return {"line": assert_kv_shift(chunks), **outcome}
    except ValueError as error:
        return {"refusal": str(error), **outcome}


def _classes(chunks: list[torch.nn.Module]) -> dict[str, str]:
    classes = {
        canonical_name(name, chunk): type(module).__name__
        for chunk in chunks
        for name, module in chunk.named_modules()
        if isinstance(module, Attention) or _has_the_place(name, module, chunk)
    }
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = [None] * group.size()
    torch.distributed.all_gather_object(stages, classes, group=group)
    return {name: kind for stage in stages for name, kind in stage.items()}


def _has_the_place(name: str, module: torch.nn.Module, chunk: torch.nn.Module) -> bool:
    """Return whether a module is in an attention's place; MLP layers of hybrid stacks have none."""
    is_hybrid = any(hasattr(part, "hybrid_layer_pattern") for part in chunk.modules())
    return name.endswith(".self_attention") and not (is_hybrid and isinstance(module, IdentityOp))
