"""What is measured: each way to shift keys and values, and what a plain copy of them takes."""

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
        label: for tables and pictures.
        shift: (key, value, alpha, beta) -> (shifted key, shifted value), differentiable.
        own: this package's, which is held to more than the others.
        compiled: needs a first call of many seconds for every shape and dtype.
        forced: what KVSHIFT_IMPLEMENTATION is while it runs; None leaves it as it is.
    """

    label: str
    shift: Pair
    own: bool = False
    compiled: bool = False
    forced: str | None = None

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Outputs, with what the backward pass needs."""
        if self.forced is not None:
            os.environ[VARIABLE] = self.forced
        return self.shift(*inputs.leaves)

    def gradients(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of key, value, alpha and beta."""
        return torch.autograd.grad(self.forward(inputs), inputs.leaves, inputs.grads)


def _each(shift: Callable[[Tensor, Tensor], Tensor]) -> Pair:
    return lambda key, value, alpha, beta: (shift(key, alpha), shift(value, beta))


def candidates(device: str, dtype: torch.dtype) -> dict[str, Candidate]:
    """Every way to shift on this device, the dearest first."""
    os.environ[VARIABLE] = "auto"
    chosen = implementation(torch.empty(1, 1, 1, 1, dtype=dtype, device=device))
    names = {"cpu": "compiled C", "triton": "Triton", "eager": "plain PyTorch"}
    found = {
        "paper": Candidate("the paper's Appendix F", _each(formulations.unfolded)),
        "conv1d": Candidate("conv1d, depthwise", _each(formulations.depthwise_convolution)),
        "pad_and_add": Candidate("pad and add", _each(formulations.padded_sum)),
        "compile": Candidate(
            "torch.compile, naive form",
            # fullgraph: where it cannot be compiled it fails, and does not run as plain PyTorch.
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
    """Plain copies of keys and values: contiguous ones of the same size.

    `copy` writes to memory that is there; `clone` asks for new memory, as outputs do.
    """

    def __init__(self, inputs: Inputs):
        self._sources = inputs.grads
        self._targets = [torch.empty_like(x) for x in inputs.grads]

    def copy(self) -> None:
        for source, target in zip(self._sources, self._targets):
            target.copy_(source)

    def clone(self) -> list[Tensor]:
        return [source.clone() for source in self._sources]
