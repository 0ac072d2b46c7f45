"""Megatron's hybrid stacks, buildable even without Transformer Engine and its modules."""

import copy
from typing import Any
from unittest.mock import NonCallableMock

from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from kvshift_megatron.specs.te_free import SDPACoreAttention

try:
    from megatron.core.models.hybrid import hybrid_layer_specs as stock
except ImportError:  # before 0.18
    from megatron.core.models.mamba import mamba_layer_specs as stock

STACK = "hybrid_stack_spec" if hasattr(stock, "hybrid_stack_spec") else "mamba_stack_spec"
INFERENCE_STACK = STACK.replace("_stack", "_inference_stack")


def buildable(spec: Any) -> Any:
    """Return a deep copy with TE-free classes in place of Megatron's mocks for missing ones."""
    found = {**vars(transformer_engine), **vars(stock)}
    mocks = {id(v): _stand_in(k) for k, v in found.items() if isinstance(v, NonCallableMock)}
    if not transformer_engine.HAVE_TE:
        mocks[id(transformer_engine.TENorm)] = WrappedTorchNorm
    # deepcopy takes these for objects that it has already copied, and puts them in.
    return copy.deepcopy(spec, mocks)


def _stand_in(name: str) -> type:
    if "DotProduct" in name:
        return SDPACoreAttention
    return RowParallelLinear if "Row" in name else ColumnParallelLinear
