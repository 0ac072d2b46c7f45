"""Measure what a rank holds from step to step: parameters, gradients, the optimizer's state."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvshift_megatron.planning.memory import unique_bytes


def static_bytes(model: Sequence[Any], optimizer: Any) -> dict[str, int]:
    """Return bytes by storage: padding counts, and a shared storage counts once.

    Args:
        model: This rank's chunks, wrapped for data parallelism.
        optimizer: Megatron's optimizer after its first step, which creates its state.

    Returns:
        parameters: elements without padding; parameter_bytes: parameters with DDP's padding, and
        buffers; gradient_bytes: DDP's gradient buffers with their padding; main_parameter_bytes:
        the optimizer's own copies; moment_bytes: Adam's two moments; other_optimizer_bytes: the
        rest of the optimizer's state.
    """
    modules = [chunk.module for chunk in model]
    parameters = [p for module in modules for p in module.parameters()]
    held = [*parameters, *(b for module in modules for b in module.buffers())]
    gradients = [p.main_grad for p in parameters if hasattr(p, "main_grad")]
    gradients += [p.grad for p in parameters if p.grad is not None]
    taken = {id(t.untyped_storage()) for t in (*held, *gradients)}
    main = [t for t in _main_parameters(optimizer) if id(t.untyped_storage()) not in taken]
    state = list(_state(optimizer))
    moments = [t for name, t in state if name in ("exp_avg", "exp_avg_sq")]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "parameter_bytes": unique_bytes(held),
        "gradient_bytes": unique_bytes(gradients),
        "main_parameter_bytes": unique_bytes(main),
        "moment_bytes": unique_bytes(moments),
        "other_optimizer_bytes": unique_bytes(t for _, t in state) - unique_bytes(moments),
    }


def static_tensors(model: Sequence[Any], optimizer: Any) -> Iterator[Tensor]:
    """Yield all tensors that `static_bytes` counts."""
    for chunk in model:
        yield from chunk.module.buffers()
        for parameter in chunk.module.parameters():
            yield parameter
            if hasattr(parameter, "main_grad"):
                yield parameter.main_grad
    yield from _main_parameters(optimizer)
    yield from (tensor for _, tensor in _state(optimizer))


def _inner(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:  # a rank may hold no parameters to optimize
            yield part.optimizer


def _main_parameters(optimizer: Any) -> Iterator[Tensor]:
    for inner in _inner(optimizer):
        for group in inner.param_groups:
            yield from group["params"]


def _state(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for inner in _inner(optimizer):
        for state in inner.state.values():
            yield from ((name, t) for name, t in state.items() if isinstance(t, Tensor))
