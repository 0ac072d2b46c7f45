"""Cast tensors to the dtype of --dtype, and count the values that it cannot hold."""

import sys

import torch
from torch import Tensor

_PART = 1 << 22  # elements that are compared at a time, so that the masks stay small


class Casts:
    """Casts of one conversion, with a count of the finite values that became infinite."""

    def __init__(self) -> None:
        self._overflows: dict[str, int] = {}
        self._dtype = torch.float32

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tensor in a dtype; count its overflows under its name.

        Reading a tensor twice counts it once.
        """
        if tensor.dtype == dtype:
            return tensor
        result = tensor.to(dtype)
        narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
        if narrower and (count := _overflows(tensor, result)):
            self._overflows[name], self._dtype = count, dtype
        return result

    def sentence(self) -> str | None:
        """Return what was lost, in a sentence; None if nothing was."""
        if not self._overflows:
            return None
        name, total = next(iter(self._overflows)), sum(self._overflows.values())
        dtype, largest = str(self._dtype).removeprefix("torch."), torch.finfo(self._dtype).max
        return (
            f"numbers above {largest:.4g}, the largest of {dtype}, were written as infinity: "
            f"{total}, in tensors: {len(self._overflows)}, the first of them {name}; choose "
            "another --dtype"
        )

    def say(self) -> None:
        """Print the sentence, if any, on standard error."""
        if sentence := self.sentence():
            print(f"kvshift-convert: warning: {sentence}", file=sys.stderr, flush=True)


def _overflows(before: Tensor, after: Tensor) -> int:
    if not after.numel():
        return 0
    # Almost always all are finite: this needs no memory.
    lowest, highest = after.aminmax()
    if lowest.isfinite() and highest.isfinite():
        return 0
    return sum(
        int((new.isinf() & old.isfinite()).sum())
        for old, new in zip(before.flatten().split(_PART), after.flatten().split(_PART))
    )
