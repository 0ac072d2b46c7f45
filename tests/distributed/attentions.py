"""Which attention stands where in a model, and where its vanilla twin has Megatron's."""

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import Attention

from kvshift_megatron import assert_kv_shift
from tests.distributed.canonical import canonical_name


def of_model(chunks: list[torch.nn.Module], vanilla: list[torch.nn.Module]) -> dict:
    """What the whole model has, on every rank.

    Args:
        chunks: this rank's part of the model.
        vanilla: the same of its vanilla twin.

    Returns:
        {"line": what `assert_kv_shift` says of the model, "refusal": what it raises instead,
        "classes": {global name of an attention: its class}, "vanilla": the same of the twin}
    """
    outcome = {"classes": _classes(chunks), "vanilla": _classes(vanilla)}
    try:
        return {"line": assert_kv_shift(chunks), **outcome}
    except ValueError as error:
        return {"refusal": str(error), **outcome}


def _classes(chunks: list[torch.nn.Module]) -> dict[str, str]:
    classes = {
        canonical_name(name, chunk): type(module).__name__
        for chunk in chunks
        for name, module in chunk.named_modules()
        if isinstance(module, Attention) or name.endswith(".self_attention")
    }
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = [None] * group.size()
    torch.distributed.all_gather_object(stages, classes, group=group)
    return {name: kind for stage in stages for name, kind in stage.items()}
