"""Comparisons that say what differs and by how much."""

import torch
from torch import Tensor

from tests.support.tolerances import FP32_REL


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||, in float64; 0 for two zero tensors."""
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, scale = torch.linalg.vector_norm(actual - expected), expected.norm()
    return float(difference / scale) if scale > 0 else (0.0 if difference == 0 else float("inf"))


def assert_close_rel(name: str, actual: Tensor, expected: Tensor, rel: float = FP32_REL) -> None:
    """Fail with the tensor's name, relative error and largest error if it is not close."""
    assert actual.shape == expected.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    error = relative_error(actual, expected)
    # Written so that a NaN fails.
    assert error <= rel, (
        f"{name}: relative error {error:.3e} > {rel:.1e}, "
        f"largest {(actual.double() - expected.double()).abs().max():.3e}"
    )
