"""kv_shift and kv_shift_rope: keys and values shifted, and the keys rotated in the same pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvshift_megatron.ops.autograd import ROPE_SHIFT, SHIFT, ShiftOperator
from kvshift_megatron.ops.checks import Taps, check_freqs, check_input, checked_index
from kvshift_megatron.ops.dispatch import implementation
from kvshift_megatron.ops.reference import rope_shift_ref, rotate, widened


def kv_shift(
    key: Tensor,
    value: Tensor,
    alpha: Taps | None,
    beta: Taps | None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shift keys with alpha and values with beta.

    K^_i = alpha_1 K_i + alpha_2 K_{i-1} + ..., V^_i = beta_1 V_i + beta_2 V_{i-1} + ...
    (arXiv 2411.19574, Eq. 5), zero before the first token.

    Args:
        key: [s, b, ng, hn] (sbhd) or [t, ng, hn] (thd).
        value: the same layout; its head size may differ from the key's.
        alpha: [window, ng], or ``window`` tensors [ng], current token first, of any floating
            dtype. None returns the keys unchanged.
        beta: likewise for the values.
        position: int [s] or [t]: the number of earlier tokens in each token's document, for packed
            documents. None: the sequence is one document.

    Returns:
        (key, value): new tensors of the inputs' shapes and dtypes, computed in fp32 (float64 for
        float64 inputs); an input whose taps are None is returned as is.

    Raises:
        ValueError: shapes or devices do not match; the message names the argument.

    Parallelism: local to the rank; the taps are those of this rank's query groups.
    """
    check_input("key", key, "alpha", alpha)
    check_input("value", value, "beta", beta)
    position = checked_index("position", position, key)
    if alpha is not None and beta is not None and _fit_one_launch(key, value, alpha, beta):
        key, value = _apply(SHIFT, [key, value], [alpha, beta], (position,))
        return key, value
    return (
        key if alpha is None else _apply(SHIFT, [key], [alpha], (position,))[0],
        value if beta is None else _apply(SHIFT, [value], [beta], (position,))[0],
    )


def kv_shift_rope(
    key: Tensor,
    value: Tensor,
    alpha: Taps | None,
    beta: Taps | None,
    freqs: Tensor,
    position: Tensor | None = None,
    *,
    freq_index: Tensor | None = None,
    interleaved: bool = False,
    mscale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Shift keys and values as `kv_shift` does, and apply the rotary embedding to the keys.

    With the Triton kernels the keys cost what their rotation alone does: one read and one write.
    Sines and cosines are fp32, as in Transformer Engine's rotation; keys are rounded once, at the
    end. (If only the kernels that rotate fail their trial, the others shift, and keys are rounded
    before the rotation too.)

    Args:
        key, value, alpha, beta, position: as in `kv_shift`.
        freqs: fp32 [positions, 1, 1, rotary], as Megatron's RotaryEmbedding makes them: both
            channels of a pair have the same angle. The first ``rotary`` channels are rotated.
            Gets no gradient.
        freq_index: int [s] or [t]: each token's row of freqs; for packed documents, its place in
            its document. None: its place in the sequence.
        interleaved: pairs are channels 2c and 2c + 1, not c and c + rotary / 2.
        mscale: factor of the sines and cosines.

    Returns:
        (rotated shifted key, shifted value); a value whose taps are None is returned as is. If
        freq_index points outside freqs, the kernels return NaN.

    Raises:
        ValueError: shapes do not match; the message names the argument.

    Parallelism: local to the rank, as `kv_shift`.
    """
    check_input("key", key, "alpha", alpha)
    check_input("value", value, "beta", beta)
    check_freqs(key, freqs, freq_index)
    position = checked_index("position", position, key)
    freq_index = checked_index("freq_index", freq_index, key)
    window = 1 if alpha is None else len(alpha)
    chosen = implementation(key, window, "rope_shift")
    if chosen != "triton":
        if implementation(key, window) == "triton":
            # Only the kernels that rotate cannot be used.
            key, value = kv_shift(key, value, alpha, beta, position)
            rotated = rotate(widened(key), freqs, freq_index, interleaved, mscale)
            return rotated.to(key.dtype), value
        return rope_shift_ref(
            key, value, alpha, beta, freqs, position,
            freq_index=freq_index, interleaved=interleaved, mscale=mscale,
        )  # fmt: skip
    settings = (position, freqs.flatten(0, -2), freq_index), (interleaved, mscale)
    if alpha is not None and beta is not None and _fit_one_launch(key, value, alpha, beta):
        key, value = _apply(ROPE_SHIFT, [key, value], [alpha, beta], *settings, chosen)
        return key, value
    if beta is not None:
        value = _apply(SHIFT, [value], [beta], (position,))[0]
    # With a window of one token the keys are only rotated.
    key_taps = key.new_ones(1, key.size(-2)) if alpha is None else alpha
    return _apply(ROPE_SHIFT, [key], [key_taps], *settings, chosen)[0], value


def _fit_one_launch(key: Tensor, value: Tensor, alpha: Taps, beta: Taps) -> bool:
    """Whether keys and values are alike and have windows of the same length."""
    alike = (key.shape, key.dtype, key.device) == (value.shape, value.dtype, value.device)
    return alike and len(alpha) == len(beta)


def _apply(
    operator: ShiftOperator,
    inputs: list[Tensor],
    taps: Sequence[Taps],
    tensors: tuple[Tensor | None, ...],
    constants: tuple[bool | float, ...] = (),
    chosen: str | None = None,
) -> list[Tensor]:
    """Call the operator with thd inputs as sbhd ones of one sample and taps in the wide dtype."""
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    stacked = [tap if isinstance(tap, Tensor) else torch.stack(list(tap)) for tap in taps]
    is_thd = inputs[0].dim() == 3
    if is_thd:
        inputs = [x.unsqueeze(1) for x in inputs]
    outputs = operator(inputs, [tap.to(wide) for tap in stacked], tensors, constants, chosen)
    return [x.squeeze(1) for x in outputs] if is_thd else outputs
