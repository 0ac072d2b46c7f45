"""kv_shift on any device, against its definition in float64 on the CPU."""

import torch
from torch import Tensor

from kvshift_megatron.attention.packed_sequences import document_positions
from kvshift_megatron.ops import kv_shift
from tests.support.compare import relative_error

SHAPES = {
    "sbhd": (70, 3, 2, 128),
    "sbhd, odd sizes": (67, 2, 3, 40),
    "one token": (1, 2, 4, 64),
    "thd": (80, 4, 128),
}


def definition(x: Tensor, taps: Tensor, document: Tensor) -> Tensor:
    """Return y_i = sum_j taps_j x_{i-j} within i's document, for x float64 [s, ...]."""
    rows = []
    for i in range(len(x)):
        same = [j for j in range(min(len(taps), i + 1)) if document[i] == document[i - j]]
        rows.append(sum(taps[j][:, None] * x[i - j] for j in same))
    return torch.stack(rows)


def shift_errors(
    shape: tuple[int, ...], dtype: torch.dtype, window: int, device: str, kinds: str = "kv"
) -> dict[str, float]:
    """Return relative errors of outputs and gradients, and of the outputs against swapped taps.

    Args:
        shape: [s, b, ng, hn], or [t, ng, hn] for packed documents, some of one token or of none.
        dtype, device: Of the inputs; keys are strided, as in Megatron.
        window: Taps per key or value.
        kinds: What is shifted: "kv", "k" or "v".
    """
    generator = torch.Generator().manual_seed(len(shape) * window)
    cu_seqlens = torch.tensor([0, 1, 3, 3, 40, shape[0]]).clamp(max=shape[0])
    document, position = document_positions(cu_seqlens, shape[0])
    if len(shape) == 4:
        document, position = torch.zeros_like(document), None
    leaves, arguments, taps, grads = {}, {}, {}, {}
    for kind in "kv":
        leaf = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        # A part of a larger tensor, as of Megatron's mixed_qkv with few or many queries per group.
        parts = 9 if shape[-1] == 40 else 2
        strided = torch.cat((leaf,) * parts, dim=-1).split(shape[-1], dim=-1)[1]
        leaves[kind], arguments[kind] = leaf, strided if kind == "k" else leaf
        taps[kind] = torch.randn(window, shape[-2], generator=generator).to(device).requires_grad_()
        grads[kind] = torch.randn(shape, generator=generator).to(device, dtype)
    outputs = kv_shift(
        arguments["k"],
        arguments["v"],
        taps["k"] if "k" in kinds else None,
        taps["v"] if "v" in kinds else None,
        None if position is None else position.to(device),
    )
    outputs = dict(zip("kv", outputs))
    assert all(x.dtype == dtype and x.shape == shape for x in outputs.values())
    assert all(outputs[kind] is arguments[kind] for kind in "kv" if kind not in kinds)
    torch.autograd.backward([outputs[kind] for kind in kinds], [grads[kind] for kind in kinds])
    errors = {}
    for kind in kinds:
        x, wide = (
            leaf.detach().cpu().double().requires_grad_() for leaf in (leaves[kind], taps[kind])
        )
        expected = definition(x, wide, document)
        expected.backward(grads[kind].cpu().double())
        output = outputs[kind].detach().cpu()
        errors[f"{kind} output"] = relative_error(output, expected)
        errors[f"{kind} input gradient"] = relative_error(leaves[kind].grad.cpu(), x.grad)
        errors[f"{kind} taps"] = relative_error(taps[kind].grad.cpu(), wide.grad)
        wrong = definition(x, wide.flip(0), document)
        errors[f"{kind} against swapped taps"] = relative_error(output, wrong)
    return errors


def assert_right(errors: dict[str, float], rounding: float) -> None:
    """Require `rounding` for outputs and gradients, and 1e-5 for the taps' fp32 sums; NaN fails."""
    for name, error in errors.items():
        if name.endswith("swapped taps"):
            assert error > 10 * rounding, (name, error)
        else:
            assert error <= (1e-5 if name.endswith(" taps") else rounding), (name, error)
