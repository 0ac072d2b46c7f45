"""Make keys, values and taps as a Megatron layer passes them to the shift."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """[s, b, ng, hn] of keys and of values, and the query heads per group that lie beside them."""

    s: int
    b: int
    ng: int
    hn: int
    queries: int = 1

    def __str__(self) -> str:
        return f"[{self.s}, {self.b}, {self.ng}, {self.hn}]"

    def __iter__(self):
        return iter((self.s, self.b, self.ng, self.hn))


@dataclass
class Inputs:
    """The inputs of one measurement.

    Attributes:
        leaves: key and value, [s, b, ng, hn] with the strides of views of mixed_qkv; alpha and
            beta, fp32 [window, ng]. All of them require gradients.
        grads: Gradients of both outputs, [s, b, ng, hn], contiguous.
    """

    leaves: tuple[Tensor, Tensor, Tensor, Tensor]
    grads: tuple[Tensor, Tensor]


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, window: int = 2) -> Inputs:
    """Make random inputs, the same ones on every call."""
    generator = torch.Generator(device).manual_seed(1)

    def random(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=of, device=device).normal_(generator=generator)

    s, b, ng, hn = shape
    # [s, b, ng, (np/ng + 2) hn]: a group's queries, then its key, then its value.
    mixed_qkv = random(s, b, ng, (shape.queries + 2) * hn)
    _, key, value = mixed_qkv.split([shape.queries * hn, hn, hn], dim=-1)
    taps = [random(window, ng, of=torch.float32) for _ in range(2)]
    leaves = tuple(x.detach().requires_grad_() for x in (key, value, *taps))
    return Inputs(leaves, (random(s, b, ng, hn), random(s, b, ng, hn)))
