"""TensorTable: what every source of an exported folder's tensors can do."""

from typing import Protocol

import torch
from torch import Tensor


class TensorTable(Protocol):
    """Rows of Hugging Face tensors; a row is read as a whole, one row at a time."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def planned(self, i: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Return name, shape and dtype of each tensor of row i, without reading it."""

    def read(self, i: int) -> tuple[Tensor, ...]:
        """Read the tensors of row i."""
