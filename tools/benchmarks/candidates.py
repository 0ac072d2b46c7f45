"""The candidates: each way to shift keys and values, and a plain copy of them for comparison."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvshift_megatron.ops import kv_shift
from kvshift_megatron.ops.dispatch import VARIABLE, implementation
from tools.benchmarks import formulations
from tools.benchmarks.inputs import Inputs

Pair = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Candidate:
    """One way to shift keys and values.

    Attributes:
        label: Name in tables and pictures.
        shift: (key, value, alpha, beta) -> (shifted key, shifted value), differentiable.
        own: Whether it is this package's, which has stricter error limits.
        compiled: Whether the first call for a shape and dtype takes many seconds.
        forced: Value of KVSHIFT_IMPLEMENTATION while it runs; None leaves it as it is.
    """

    label: str
    shift: Pair
    own: bool = False
    compiled: bool = False
    forced: str | None = None

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the outputs, with what the backward pass needs."""
        if self.forced is not None:
            os.environ[VARIABLE] = self.forced
        return self.shift(*inputs.leaves)

    def gradients(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Run forward and backward; return the gradients of key, value, alpha and beta."""
        return torch.autograd.grad(self.forward(inputs), inputs.leaves, inputs.grads)


def _each(shift: Callable[[Tensor, Tensor], Tensor]) -> Pair:
    return lambda key, value, alpha, beta: (shift(key, alpha), shift(value, beta))


def candidates(device: str, dtype: torch.dtype) -> dict[str, Candidate]:
    """Return every way to shift on this device, most expensive first."""
    os.environ[VARIABLE] = "auto"
    chosen = implementation(torch.empty(1, 1, 1, 1, dtype=dtype, device=device))
    names = {"cpu": "compiled C", "triton": "Triton", "eager": "plain PyTorch"}
    found = {
        "paper": Candidate("the paper's Appendix F", _each(formulations.unfolded)),
        "conv1d": Candidate("conv1d, depthwise", _each(formulations.depthwise_convolution)),
        "pad_and_add": Candidate("pad and add", _each(formulations.padded_sum)),
        "compile": Candidate(
            "torch.compile, naive form",
            # fullgraph: what cannot be compiled fails instead of running as plain PyTorch.
            torch.compile(formulations.naive_pair, fullgraph=True, dynamic=False),
            compiled=True,
        ),
        "eager": Candidate("kvshift, plain PyTorch", kv_shift, own=True, forced="eager"),
    }
    if chosen != "eager":
        label = f"kvshift, {names.get(chosen, chosen)}"
        found["chosen"] = Candidate(label, kv_shift, own=True, forced=chosen)
    return found


class Copies:
    """Plain copies of contiguous tensors as large as keys and values.

    `copy` writes to existing memory; `clone` allocates new memory, as outputs do.
    """

    def __init__(self, inputs: Inputs):
        self._sources = inputs.grads
        self._targets = [torch.empty_like(x) for x in inputs.grads]

    def copy(self) -> None:
        for source, target in zip(self._sources, self._targets):
            target.copy_(source)

    def clone(self) -> list[Tensor]:
        return [source.clone() for source in self._sources]
