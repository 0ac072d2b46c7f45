"""kv_shift_rope: keys and values shifted and the keys rotated, in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvshift_megatron.ops.api import Taps, can_go_together, check, check_places, kv_shift
from kvshift_megatron.ops.autograd import empty, has_no_data, to_keep
from kvshift_megatron.ops.dispatch import implementation
from kvshift_megatron.ops.rope_reference import rope_shift_ref


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
    """`kv_shift`, and the rotary embedding of the shifted keys.

    By Triton's kernels keys cost what their rotation alone does: one read and one write. Sines and
    cosines are fp32, as in Transformer Engine's rotation; keys are rounded once, at the end.

    Args:
        key, value, alpha, beta, position: as kv_shift's.
        freqs: fp32 [positions, 1, 1, rotary], as Megatron's RotaryEmbedding makes them: the two
            channels of a pair have one angle. The first ``rotary`` channels turn. No gradient.
        freq_index: int64 [s] or [t]: the row of freqs for each token, for packed documents its
            place in its document; None: the token's own place in the sequence.
        interleaved: channels 2c and 2c + 1 are a pair, not c and c + rotary / 2.
        mscale: sines and cosines are multiplied by it.

    Returns:
        (rotated shifted key, shifted value); a value whose taps are None is returned as it came.
        Where freq_index points outside of freqs, the kernels return NaN.

    Raises:
        ValueError: shapes that do not fit each other; the message names the argument.

    Parallelism: local to the rank, as kv_shift.
    """
    check("key", key, "alpha", alpha)
    check("value", value, "beta", beta)
    _check_freqs(key, freqs, freq_index)
    position = check_places("position", position, key)
    freq_index = check_places("freq_index", freq_index, key)
    if implementation(key) != "triton":
        taps = [None if tap is None else _stacked(tap) for tap in (alpha, beta)]
        return rope_shift_ref(
            key, value, *taps, freqs, position,
            freq_index=freq_index, interleaved=interleaved, mscale=mscale,
        )  # fmt: skip
    settings = position, freqs.flatten(0, -2), freq_index, interleaved, mscale
    if can_go_together(key, value, alpha, beta):
        return tuple(_shift([key, value], [_stacked(alpha), _stacked(beta)], *settings))
    # A window of one token: keys are only rotated.
    taps = key.new_ones(1, key.size(-2)) if alpha is None else _stacked(alpha)
    value = kv_shift(key, value, None, beta, position)[1]
    return _shift([key], [taps], *settings)[0], value


def _shift(inputs: list[Tensor], taps: list[Tensor], *settings) -> list[Tensor]:
    is_thd = inputs[0].dim() == 3
    inputs = to_keep([x.unsqueeze(1) for x in inputs] if is_thd else inputs)
    taps = [tap.float() for tap in taps]
    if torch.compiler.is_compiling():
        outputs = _rope_shift_operator(inputs, taps, *settings)
    else:
        # A registered operator costs the host several times this.
        outputs = _RopeShift.apply(*settings, *inputs, *taps)
    return [x.squeeze(1) for x in outputs] if is_thd else list(outputs)


def _stacked(taps: Taps) -> Tensor:
    return taps if isinstance(taps, Tensor) else torch.stack(list(taps))


def _check_freqs(key: Tensor, freqs: Tensor, freq_index: Tensor | None) -> None:
    rotary = freqs.size(-1)
    if freqs.dtype != torch.float32 or freqs.requires_grad:
        raise ValueError(
            f"freqs must be fp32 and need no gradient, not {freqs.dtype} with requires_grad="
            f"{freqs.requires_grad}: rotate the keys behind kv_shift instead"
        )
    if freqs.numel() != freqs.size(0) * rotary or rotary % 2 or rotary > key.size(-1):
        raise ValueError(
            f"freqs must be [positions, 1, 1, rotary] with an even rotary of at most "
            f"{key.size(-1)}, the head size of key, not {list(freqs.shape)}"
        )
    if freq_index is None and freqs.size(0) < key.size(0):
        raise ValueError(
            f"freqs has angles for {freqs.size(0)} positions and key has {key.size(0)} tokens: "
            "pass as many, or freq_index"
        )


def _forward(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None, *rope
) -> list[Tensor]:
    if has_no_data(inputs[0]):
        return _rope_shift_operator(list(inputs), list(taps), position, *rope)
    # Imported late: Triton is not everywhere.
    from kvshift_megatron.ops.triton import rope_launch

    return rope_launch.forward(inputs, taps, position, *rope)


def _backward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    *rope_and_grads,
) -> list[Tensor]:
    if has_no_data(inputs[0]):
        *rope, grads = rope_and_grads
        return _backward_operator(list(inputs), list(taps), position, *rope, list(grads))
    from kvshift_megatron.ops.triton import rope_launch

    return rope_launch.backward(inputs, taps, position, *rope_and_grads)


class _RopeShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, position, freqs, freq_index, interleaved, mscale, *inputs_and_taps):
        half = len(inputs_and_taps) // 2
        ctx.save_for_backward(position, freqs, freq_index, *inputs_and_taps)
        ctx.settings = interleaved, mscale
        inputs, taps = inputs_and_taps[:half], inputs_and_taps[half:]
        return tuple(_forward(inputs, taps, position, freqs, freq_index, interleaved, mscale))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *output_grads):
        position, freqs, freq_index, *inputs_and_taps = ctx.saved_tensors
        half = len(output_grads)
        inputs, taps = inputs_and_taps[:half], inputs_and_taps[half:]
        rope = freqs, freq_index, *ctx.settings
        return *[None] * 5, *_backward(inputs, taps, position, *rope, output_grads)


@torch.library.custom_op("kvshift_megatron::rope_shift", mutates_args=())
def _rope_shift_operator(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    freqs: Tensor,
    freq_index: Tensor | None,
    interleaved: bool,
    mscale: float,
) -> list[Tensor]:
    # The choice was made while torch.compile traced; the trial of the kernels may only come now.
    if implementation(inputs[0]) != "triton":
        raise RuntimeError(
            "the Triton kernels, compiled into this graph, fail their trial on this device (see "
            "the log): set KVSHIFT_IMPLEMENTATION=eager and start again"
        )
    return _forward(inputs, taps, position, freqs, freq_index, interleaved, mscale)


@torch.library.custom_op("kvshift_megatron::rope_shift_backward", mutates_args=())
def _backward_operator(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    freqs: Tensor,
    freq_index: Tensor | None,
    interleaved: bool,
    mscale: float,
    output_grads: Sequence[Tensor],
) -> list[Tensor]:
    rope = freqs, freq_index, interleaved, mscale
    grads = _backward(inputs, taps, position, *rope, output_grads)
    # An operator's results may not share memory, and the taps' gradients do.
    return grads[: len(inputs)] + [grad.clone() for grad in grads[len(inputs) :]]


@_rope_shift_operator.register_fake
def _(inputs, taps, position, freqs, freq_index, interleaved, mscale):
    return [empty(x) for x in inputs]


@_backward_operator.register_fake
def _(inputs, taps, position, freqs, freq_index, interleaved, mscale, output_grads):
    return [empty(x) for x in (*inputs, *taps)]


def _keep_inputs(ctx, inputs, output) -> None:
    xs, taps, position, freqs, freq_index, *ctx.settings = inputs
    ctx.count = len(xs)
    ctx.save_for_backward(*xs, *taps, position, freqs, freq_index)


def _differentiate(ctx, output_grads: list[Tensor]):
    *tensors, position, freqs, freq_index = ctx.saved_tensors
    inputs, taps = tensors[: ctx.count], tensors[ctx.count :]
    rope = freqs, freq_index, *ctx.settings
    grads = _backward_operator(inputs, taps, position, *rope, list(output_grads))
    return grads[: ctx.count], grads[ctx.count :], *[None] * 5


_rope_shift_operator.register_autograd(_differentiate, setup_context=_keep_inputs)
