"""Triton kernels of the shift: one pass over keys and values forward, one backward.

A program takes BLOCK_S tokens of one query group of one sample; keys and values go in one launch
(axis 2 of the grid). Each row is read with its `window - 1` neighbours, which are in cache by then,
so that device memory sees every element once: 2 tensors forward, 3 backward. The arithmetic is in
fp32. Sums of the taps' gradients are kept apart per program and added up in a fixed order later:
no atomics, so the same inputs give the same bits.

x, dy, out: [s, b, ng, hn] by their strides in elements, the last of them 1.
taps: fp32 [window, ng], contiguous. position: int [s], or anything where PACKED is False.
"""

import triton
import triton.language as tl


@triton.jit
def _shift(
    x, x_s, x_b, x_g, out, taps, position, tokens, samples, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j taps[j] x_{i-j}, where i - j is a token of the same document."""
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.arange(0, BLOCK_D)[None, :]
    sample, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    sample = sample.to(tl.int64)  # offsets do not fit in 32 bits
    is_row, is_channel = rows < tokens, channels < HEAD
    before = rows
    if PACKED:
        before = tl.load(position + rows, mask=is_row, other=0)
    row = rows[:, None].to(tl.int64)
    source = x + sample * x_b + group * x_g + channels
    current = tl.load(source + row * x_s, mask=is_row[:, None] & is_channel, other=0.0)
    result = tl.load(taps + group) * current.to(tl.float32)
    for j in tl.static_range(1, WINDOW):
        has_previous = (is_row & (before >= j))[:, None] & is_channel
        previous = tl.load(source + (row - j) * x_s, mask=has_previous, other=0.0)
        result += tl.load(taps + j * groups + group) * previous.to(tl.float32)
    target = out + (row * samples + sample) * groups * HEAD + group * HEAD + channels
    tl.store(target, result.to(out.dtype.element_ty), mask=is_row[:, None] & is_channel)


@triton.jit
def _shift_backward(
    x, x_s, x_b, x_g, dy, dy_s, dy_b, dy_g, dx, taps, dtaps, position, tokens, samples, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx_i = sum_j taps[j] dy_{i+j}; dtaps[j] += sum_i dy_{i+j} x_i: each x is read once."""
    rows = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.arange(0, BLOCK_D)[None, :]
    sample, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    sample = sample.to(tl.int64)  # offsets do not fit in 32 bits
    is_row, is_channel = rows < tokens, channels < HEAD
    row = rows[:, None].to(tl.int64)
    inside = is_row[:, None] & is_channel
    own = tl.load(x + sample * x_b + group * x_g + channels + row * x_s, mask=inside, other=0.0)
    own = own.to(tl.float32)
    source = dy + sample * dy_b + group * dy_g + channels
    grad = tl.load(source + row * dy_s, mask=inside, other=0.0).to(tl.float32)
    result = tl.load(taps + group) * grad
    # dtaps: [window, groups, blocks of tokens, samples]
    slot = (group * tl.num_programs(0) + tl.program_id(0)) * samples + sample
    stride = groups * tl.num_programs(0) * samples
    tl.store(dtaps + slot, tl.sum(grad * own))
    for j in tl.static_range(1, WINDOW):
        later = rows + j
        has_next = later < tokens
        if PACKED:
            has_next &= tl.load(position + later, mask=has_next, other=0) >= j
        grad = tl.load(
            source + (row + j) * dy_s, mask=has_next[:, None] & is_channel, other=0.0
        ).to(tl.float32)
        result += tl.load(taps + j * groups + group) * grad
        tl.store(dtaps + j * stride + slot, tl.sum(grad * own))
    target = dx + (row * samples + sample) * groups * HEAD + group * HEAD + channels
    tl.store(target, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def shift_kernel(
    k, k_s, k_b, k_g, k_out, alpha, v, v_s, v_b, v_g, v_out, beta,
    position, tokens, samples, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, samples * groups, 2): keys, and values; 1 on the last: k alone."""
    if tl.program_id(2) == 0:
        _shift(
            k, k_s, k_b, k_g, k_out, alpha,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    else:
        _shift(
            v, v_s, v_b, v_g, v_out, beta,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, BLOCK_S, BLOCK_D,
        )  # fmt: skip


@triton.jit
def shift_backward_kernel(
    k, k_s, k_b, k_g, dk, dk_s, dk_b, dk_g, k_grad, alpha, dalpha,
    v, v_s, v_b, v_g, dv, dv_s, dv_b, dv_g, v_grad, beta, dbeta,
    position, tokens, samples, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid as shift_kernel's."""
    if tl.program_id(2) == 0:
        _shift_backward(
            k, k_s, k_b, k_g, dk, dk_s, dk_b, dk_g, k_grad, alpha, dalpha,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    else:
        _shift_backward(
            v, v_s, v_b, v_g, dv, dv_s, dv_b, dv_g, v_grad, beta, dbeta,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, BLOCK_S, BLOCK_D,
        )  # fmt: skip
