"""Triton kernels of the shift: one pass over keys and values forward, one backward.

A program processes BLOCK_S tokens of one query group of one sample; keys and values share a launch
(axis 2 of the grid). Each row is read with its `window - 1` neighbours, which are in cache by then,
so device memory transfers every element once: 2 tensors forward, 3 backward. The arithmetic is in
fp32. Each program stores its sums of the taps' gradients separately, to be added in a fixed order:
no atomics, so the same inputs give the same bits.

x, dy, out: [s, b, ng, hn] by their strides in elements; the last stride is 1.
taps: fp32 [window, ng], contiguous. position: int [s]; ignored if PACKED is False.
"""

import triton
import triton.language as tl


@triton.jit
def shift_rows(
    source, source_s, target, taps, before, is_row, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Shift one tile of one head.

    source, target: pointers [BLOCK_S, 1] to each row's first channel. taps: pointer to the head's
    first tap. before: [BLOCK_S], how many tokens of its document precede each row.
    """
    channels = tl.arange(0, BLOCK_D)[None, :]
    is_channel = channels < HEAD
    inside = is_row[:, None] & is_channel
    current = tl.load(source + channels, mask=inside, other=0.0)
    result = tl.load(taps) * current.to(tl.float32)
    for j in tl.static_range(1, WINDOW):
        has_previous = (is_row & (before >= j))[:, None] & is_channel
        previous = tl.load(source - j * source_s + channels, mask=has_previous, other=0.0)
        result += tl.load(taps + j * groups) * previous.to(tl.float32)
    tl.store(target + channels, result.to(target.dtype.element_ty), mask=inside)


@triton.jit
def has_later(position, rows, j: tl.constexpr, tokens, PACKED: tl.constexpr):
    """Whether the token j after each row exists and belongs to the same document."""
    later = rows + j
    is_there = later < tokens
    if PACKED:
        is_there &= tl.load(position + later, mask=is_there, other=0) >= j
    return is_there


# Not one function for all three: what a loop reads again needs no register between.
@triton.jit
def block_count(tokens, BLOCK_S: tl.constexpr, ONE_AXIS: tl.constexpr):
    """Return the number of blocks of tokens."""
    return tl.cdiv(tokens, BLOCK_S) if ONE_AXIS else tl.num_programs(0)


@triton.jit
def block_index(tokens, BLOCK_S: tl.constexpr, ONE_AXIS: tl.constexpr):
    """Return this program's block of tokens."""
    return tl.program_id(0) % tl.cdiv(tokens, BLOCK_S) if ONE_AXIS else tl.program_id(0)


@triton.jit
def first_head(tokens, HEADS: tl.constexpr, BLOCK_S: tl.constexpr, ONE_AXIS: tl.constexpr):
    """Return this program's first head."""
    return (tl.program_id(0) // tl.cdiv(tokens, BLOCK_S) if ONE_AXIS else tl.program_id(1)) * HEADS


@triton.jit
def shift_heads(
    x, x_s, x_b, x_g, out, taps, position, tokens, samples, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """out_i = sum_j taps[j] x_{i-j} over the tokens i - j of the same document."""
    rows = block_index(tokens, BLOCK_S, ONE_AXIS) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_row = rows < tokens
    before = rows
    if PACKED:
        # A position may count tokens that x does not hold.
        before = tl.minimum(tl.load(position + rows, mask=is_row, other=0), rows)
    row = rows[:, None].to(tl.int64)  # offsets may exceed 32 bits
    for i in range(HEADS):
        head = first_head(tokens, HEADS, BLOCK_S, ONE_AXIS) + i
        sample, group = (head // groups).to(tl.int64), head % groups
        shift_rows(
            x + sample * x_b + group * x_g + row * x_s, x_s,
            out + (row * samples + sample) * groups * HEAD + group * HEAD,
            taps + group, before, is_row, groups, HEAD, WINDOW, BLOCK_D,
        )  # fmt: skip


@triton.jit
def shift_heads_backward(
    x, x_s, x_b, x_g, dy, dy_s, dy_b, dy_g, dx, taps, dtaps, position, tokens, samples, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """dx_i = sum_j taps[j] dy_{i+j}; dtaps[j] = sum_i dy_{i+j} x_i, so each x is read once."""
    rows = block_index(tokens, BLOCK_S, ONE_AXIS) * BLOCK_S + tl.arange(0, BLOCK_S)
    channels = tl.arange(0, BLOCK_D)[None, :]
    is_row, is_channel = rows < tokens, channels < HEAD
    inside = is_row[:, None] & is_channel
    row = rows[:, None].to(tl.int64)
    for i in range(HEADS):
        head = first_head(tokens, HEADS, BLOCK_S, ONE_AXIS) + i
        sample, group = (head // groups).to(tl.int64), head % groups
        own = x + sample * x_b + group * x_g + row * x_s + channels
        own = tl.load(own, mask=inside, other=0.0).to(tl.float32)
        source = dy + sample * dy_b + group * dy_g + row * dy_s + channels
        grad = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        result = tl.load(taps + group) * grad
        # dtaps: [window, groups, blocks of tokens, samples]
        blocks = block_count(tokens, BLOCK_S, ONE_AXIS)
        slot = group * blocks + block_index(tokens, BLOCK_S, ONE_AXIS)
        slot = slot * samples + sample
        stride = groups * blocks * samples
        tl.store(dtaps + slot, tl.sum(grad * own))
        for j in tl.static_range(1, WINDOW):
            has_next = has_later(position, rows, j, tokens, PACKED)[:, None] & is_channel
            grad = tl.load(source + j * dy_s, mask=has_next, other=0.0).to(tl.float32)
            result += tl.load(taps + j * groups + group) * grad
            tl.store(dtaps + j * stride + slot, tl.sum(grad * own))
        target = dx + (row * samples + sample) * groups * HEAD + group * HEAD + channels
        tl.store(target, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def shift_kernel(
    k, k_s, k_b, k_g, k_out, alpha, v, v_s, v_b, v_g, v_out, beta,
    position, tokens, samples, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """Grid: `launch.grid_of` of the blocks of tokens, and of samples * groups."""
    if tl.program_id(2) == 0:
        shift_heads(
            k, k_s, k_b, k_g, k_out, alpha,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, 1, BLOCK_S, BLOCK_D,
            ONE_AXIS,
        )  # fmt: skip
    else:
        shift_heads(
            v, v_s, v_b, v_g, v_out, beta,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, 1, BLOCK_S, BLOCK_D,
            ONE_AXIS,
        )  # fmt: skip


@triton.jit
def shift_backward_kernel(
    k, k_s, k_b, k_g, dk, dk_s, dk_b, dk_g, k_grad, alpha, dalpha,
    v, v_s, v_b, v_g, dv, dv_s, dv_b, dv_g, v_grad, beta, dbeta,
    position, tokens, samples, groups,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """Grid: as shift_kernel's."""
    if tl.program_id(2) == 0:
        shift_heads_backward(
            k, k_s, k_b, k_g, dk, dk_s, dk_b, dk_g, k_grad, alpha, dalpha,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, 1, BLOCK_S, BLOCK_D,
            ONE_AXIS,
        )  # fmt: skip
    else:
        shift_heads_backward(
            v, v_s, v_b, v_g, dv, dv_s, dv_b, dv_g, v_grad, beta, dbeta,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, 1, BLOCK_S, BLOCK_D,
            ONE_AXIS,
        )  # fmt: skip
