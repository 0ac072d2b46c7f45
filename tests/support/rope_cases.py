"""kv_shift_rope on any device, against complex numbers in float64 on the CPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvshift_megatron.attention.packed_sequences import document_positions
from kvshift_megatron.ops import kv_shift_rope
from tests.support.compare import relative_error
from tests.support.shift_cases import definition


@dataclass
class Case:
    """One call.

    Args:
        shape: [s, b, ng, hn], or [t, ng, hn] for packed documents.
        kinds: What is shifted, among "kv"; keys are always rotated.
    """

    shape: tuple[int, ...] = (70, 2, 2, 128)
    dtype: torch.dtype = torch.float32
    window: int = 2
    rotary: int = 128
    interleaved: bool = False
    mscale: float = 1.0
    kinds: str = "kv"


_ODD = {"shape": (67, 1, 3, 40), "rotary": 24, "mscale": 1.3, "window": 3}
_THD = {"shape": (80, 4, 64), "rotary": 64}
CASES = {
    "halves": Case(),
    "interleaved": Case(interleaved=True),
    "halves, odd sizes": Case(**_ODD),
    "interleaved, odd sizes": Case(**_ODD, interleaved=True),
    "one token": Case(shape=(1, 2, 4, 64), rotary=64),
    "thd": Case(**_THD),
    "thd, interleaved, window 4": Case(**_THD, interleaved=True, window=4),
    "thd, keys alone": Case(**_THD, kinds="k"),
    "thd, keys only rotated": Case(**_THD, kinds="v"),
    "nothing shifted": Case(**_THD, kinds=""),
    "bf16": Case(dtype=torch.bfloat16, rotary=64),
    "fp16, interleaved": Case(dtype=torch.float16, rotary=32, interleaved=True),
}


def rotated(x: Tensor, angles: Tensor, case: Case) -> Tensor:
    """Multiply pairs of channels of [s, b, ng, hn], as complex numbers, by mscale e^(i angle)."""
    half = case.rotary // 2
    if case.interleaved:
        first, second = slice(0, case.rotary, 2), slice(1, case.rotary, 2)
    else:
        first, second = slice(half), slice(half, case.rotary)
    pairs = torch.complex(x[..., first], x[..., second])
    pairs = pairs * torch.polar(torch.full_like(angles, case.mscale), angles)[:, None, None]
    out = x.clone()
    out[..., first], out[..., second] = pairs.real, pairs.imag
    return out


def rope_errors(case: Case, device: str) -> dict[str, float]:
    """Return relative errors of outputs and gradients, and of keys against a wrong rotation."""
    generator = torch.Generator().manual_seed(3 + case.window)
    is_thd = len(case.shape) == 3
    tokens, groups, head = case.shape[0], case.shape[-2], case.shape[-1]
    cu_seqlens = torch.tensor([0, 1, 3, 3, 40, tokens]).clamp(max=tokens)
    document, position = document_positions(cu_seqlens, tokens)
    place = position if is_thd else torch.arange(tokens)
    if not is_thd:
        document, position = torch.zeros_like(document), None
    angles = torch.arange(tokens)[:, None] * 1.7 ** -torch.arange(case.rotary / 2)
    freqs = torch.stack((angles, angles), dim=-1 if case.interleaved else 1).flatten(1)
    leaves, arguments, taps, grads = {}, {}, {}, {}
    for kind in "kv":
        leaf = torch.randn(case.shape, generator=generator).to(device, case.dtype)
        leaves[kind] = leaf.requires_grad_()
        # A strided part of a larger tensor, as in Megatron's projection.
        arguments[kind] = torch.cat((leaf, leaf), dim=-1).split(head, dim=-1)[1]
        taps[kind] = torch.randn(case.window, groups, generator=generator).to(device)
        taps[kind].requires_grad_()
        grads[kind] = torch.randn(case.shape, generator=generator).to(device, case.dtype)
    outputs = kv_shift_rope(
        *arguments.values(),
        *(taps[kind] if kind in case.kinds else None for kind in "kv"),
        freqs[:, None, None].to(device),
        None if position is None else position.to(device),
        freq_index=place.to(device) if is_thd else None,
        interleaved=case.interleaved,
        mscale=case.mscale,
    )
    assert outputs[1] is arguments["v"] or "v" in case.kinds
    torch.autograd.backward(outputs, list(grads.values()))
    errors = {}
    for kind, output in zip("kv", outputs):
        assert output.dtype == case.dtype and output.shape == case.shape
        x, wide = (t.detach().cpu().double().requires_grad_() for t in (leaves[kind], taps[kind]))
        shifted = definition(x, wide, document) if kind in case.kinds else x
        expected = shifted
        if kind == "k":
            batched = shifted.unsqueeze(1) if is_thd else shifted
            angle = angles[place].double()
            expected = rotated(batched, angle, case).view(case.shape)
            wrong = rotated(batched, -angle, case).view(case.shape)
            # The first token's angle is 0.
            errors["k against the wrong direction"] = (
                relative_error(output.detach().cpu(), wrong) if tokens > 1 else 1.0
            )
        expected.backward(grads[kind].cpu().double())
        errors[f"{kind} output"] = relative_error(output.detach().cpu(), expected)
        errors[f"{kind} input gradient"] = relative_error(leaves[kind].grad.cpu(), x.grad)
        if kind in case.kinds:
            errors[f"{kind} taps"] = relative_error(taps[kind].grad.cpu(), wide.grad)
    return errors


def assert_rope(errors: dict[str, float], rounding: float) -> None:
    """Require what shift_cases.assert_right does."""
    for name, error in errors.items():
        if name.endswith("wrong direction"):
            assert error > 10 * rounding, (name, error)
        else:
            assert error <= (1e-5 if name.endswith(" taps") else rounding), (name, error)
