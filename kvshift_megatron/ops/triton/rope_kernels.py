"""Triton kernels that shift and rotate keys in one pass, and shift values in the same launch.

A program processes BLOCK_S tokens of HEADS heads (query groups of samples) in a loop, so a token's
sines and cosines are computed once for all of them. On axis 2 of the grid, keys are at 0 and values
at 1. What is not described here is as in kernels.py.

The rotary part of a head is held as two halves a and b, whose channels pair up: the first and the
second half of the channels, or the even and the odd ones if INTERLEAVED. freqs: fp32
[positions, ROTARY] by its stride; both channels of a pair have the same angle. index: int [s], each
token's row of freqs; ignored if INDEXED is False.
"""

import triton
import triton.language as tl

from kvshift_megatron.ops.triton.kernels import (
    block_count,
    block_index,
    first_head,
    has_later,
    shift_heads,
    shift_heads_backward,
    shift_rows,
)


@triton.jit
def _load_halves(
    base, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return (a, b), each fp32 [BLOCK_S, BLOCK_H]; base: pointers [BLOCK_S, 1] to channel 0."""
    if INTERLEAVED:
        channels = tl.arange(0, 2 * BLOCK_H)[None, :]
        both = tl.load(base + channels, mask=inside & (channels < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(both, (BLOCK_S, BLOCK_H, 2)))
    else:
        channels = tl.arange(0, BLOCK_H)[None, :]
        inside = inside & (channels < HALF)
        a = tl.load(base + channels, mask=inside, other=0.0)
        b = tl.load(base + HALF + channels, mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_halves(
    base, a, b, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store what `_load_halves` loads, in the dtype of base."""
    dtype = base.dtype.element_ty
    if INTERLEAVED:
        channels = tl.arange(0, 2 * BLOCK_H)[None, :]
        both = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), (BLOCK_S, 2 * BLOCK_H))
        tl.store(base + channels, both, mask=inside & (channels < 2 * HALF))
    else:
        channels = tl.arange(0, BLOCK_H)[None, :]
        inside = inside & (channels < HALF)
        tl.store(base + channels, a.to(dtype), mask=inside)
        tl.store(base + HALF + channels, b.to(dtype), mask=inside)


@triton.jit
def _cos_sin(
    freqs, freq_s, positions, index, rows, is_row, mscale,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INDEXED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return mscale (cos, sin), each fp32 [BLOCK_S, BLOCK_H]; NaN if index is outside freqs."""
    place, is_known = rows, is_row
    if INDEXED:
        place = tl.load(index + rows, mask=is_row, other=0)
        is_known = is_row & (place >= 0) & (place < positions)
    base = freqs + place[:, None].to(tl.int64) * freq_s
    angle, _ = _load_halves(base, is_known[:, None], HALF, INTERLEAVED, BLOCK_S, BLOCK_H)
    if INDEXED:
        angle = tl.where((is_row & (is_known == 0))[:, None], float("nan"), angle)
    return tl.cos(angle) * mscale, tl.sin(angle) * mscale


@triton.jit
def _turn(a, b, cos, sin):
    """Rotate the pairs (a, b); fused as compilers fuse a * cos + (-b) * sin."""
    return tl.fma(a, cos, -b * sin), tl.fma(b, cos, a * sin)


@triton.jit
def _keys(
    x, x_s, x_b, x_g, out, taps, freqs, freq_s, positions, index, mscale,
    position, tokens, samples, groups,
    HEAD: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, INDEXED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """out_i = R_i sum_j taps[j] x_{i-j}; channels from ROTARY on are only shifted."""
    HALF: tl.constexpr = ROTARY // 2
    rows = block_index(tokens, BLOCK_S, ONE_AXIS) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_row = rows < tokens
    before = rows
    if PACKED:
        # A position may count tokens that x does not hold.
        before = tl.minimum(tl.load(position + rows, mask=is_row, other=0), rows)
    row = rows[:, None].to(tl.int64)
    cos, sin = _cos_sin(
        freqs, freq_s, positions, index, rows, is_row, mscale,
        HALF, INTERLEAVED, INDEXED, BLOCK_S, BLOCK_H,
    )  # fmt: skip
    for i in range(HEADS):
        head = first_head(tokens, HEADS, BLOCK_S, ONE_AXIS) + i
        sample, group = (head // groups).to(tl.int64), head % groups
        source = x + sample * x_b + group * x_g + row * x_s
        target = out + (row * samples + sample) * groups * HEAD + group * HEAD
        inside = is_row[:, None]
        tap = tl.load(taps + group)
        a, b = _load_halves(source, inside, HALF, INTERLEAVED, BLOCK_S, BLOCK_H)
        a, b = tap * a, tap * b
        for j in tl.static_range(1, WINDOW):
            tap = tl.load(taps + j * groups + group)
            has_previous = (is_row & (before >= j))[:, None]
            pa, pb = _load_halves(
                source - j * x_s, has_previous, HALF, INTERLEAVED, BLOCK_S, BLOCK_H
            )
            a += tap * pa
            b += tap * pb
        a, b = _turn(a, b, cos, sin)
        _store_halves(target, a, b, inside, HALF, INTERLEAVED, BLOCK_S, BLOCK_H)
        if ROTARY < HEAD:
            shift_rows(
                source + ROTARY, x_s, target + ROTARY, taps + group, before, is_row, groups,
                HEAD - ROTARY, WINDOW, BLOCK_P,
            )  # fmt: skip


@triton.jit
def _keys_backward(
    x, x_s, x_b, x_g, dy, dy_s, dy_b, dy_g, dx, taps, dtaps,
    freqs, freq_s, positions, index, mscale, position, tokens, samples, groups,
    HEAD: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, INDEXED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """dx_i = sum_j taps[j] R_{i+j}^T dy_{i+j}; dtaps[j] = sum_i x_i . R_{i+j}^T dy_{i+j}."""
    HALF: tl.constexpr = ROTARY // 2
    rows = block_index(tokens, BLOCK_S, ONE_AXIS) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_row = rows < tokens
    row = rows[:, None].to(tl.int64)
    inside = is_row[:, None]
    cos, sin = _cos_sin(
        freqs, freq_s, positions, index, rows, is_row, mscale,
        HALF, INTERLEAVED, INDEXED, BLOCK_S, BLOCK_H,
    )  # fmt: skip
    if WINDOW > 1:
        # Those of the next token as well, once for all heads. Later tokens of a longer window
        # compute theirs for each head.
        next_cos, next_sin = _cos_sin(
            freqs, freq_s, positions, index, rows + 1, has_later(position, rows, 1, tokens, PACKED),
            mscale, HALF, INTERLEAVED, INDEXED, BLOCK_S, BLOCK_H,
        )  # fmt: skip
    for i in range(HEADS):
        head = first_head(tokens, HEADS, BLOCK_S, ONE_AXIS) + i
        sample, group = (head // groups).to(tl.int64), head % groups
        own = x + sample * x_b + group * x_g + row * x_s
        source = dy + sample * dy_b + group * dy_g + row * dy_s
        target = dx + (row * samples + sample) * groups * HEAD + group * HEAD
        # dtaps: [window, groups, blocks of tokens, samples]
        blocks = block_count(tokens, BLOCK_S, ONE_AXIS)
        slot = group * blocks + block_index(tokens, BLOCK_S, ONE_AXIS)
        slot = slot * samples + sample
        stride = groups * blocks * samples
        xa, xb = _load_halves(own, inside, HALF, INTERLEAVED, BLOCK_S, BLOCK_H)
        dxa, dxb = tl.zeros_like(xa), tl.zeros_like(xb)
        if ROTARY < HEAD:
            rest = ROTARY + tl.arange(0, BLOCK_P)[None, :]
            is_rest = rest < HEAD
            xp = tl.load(own + rest, mask=inside & is_rest, other=0.0).to(tl.float32)
            dxp = tl.zeros_like(xp)
        for j in tl.static_range(0, WINDOW):
            tap = tl.load(taps + j * groups + group)
            is_there = has_later(position, rows, j, tokens, PACKED)
            there = is_there[:, None]
            a, b = _load_halves(source + j * dy_s, there, HALF, INTERLEAVED, BLOCK_S, BLOCK_H)
            if j == 0:
                a, b = _turn(a, b, cos, -sin)
            elif j == 1:
                a, b = _turn(a, b, next_cos, -next_sin)
            else:
                c, s = _cos_sin(
                    freqs, freq_s, positions, index, rows + j, is_there, mscale,
                    HALF, INTERLEAVED, INDEXED, BLOCK_S, BLOCK_H,
                )  # fmt: skip
                a, b = _turn(a, b, c, -s)
            dxa += tap * a
            dxb += tap * b
            total = tl.sum(a * xa + b * xb)
            if ROTARY < HEAD:
                p = tl.load(source + j * dy_s + rest, mask=there & is_rest, other=0.0)
                p = p.to(tl.float32)
                dxp += tap * p
                total += tl.sum(p * xp)
            tl.store(dtaps + j * stride + slot, total)
        _store_halves(target, dxa, dxb, inside, HALF, INTERLEAVED, BLOCK_S, BLOCK_H)
        if ROTARY < HEAD:
            tl.store(target + rest, dxp.to(dx.dtype.element_ty), mask=inside & is_rest)


@triton.jit
def rope_shift_kernel(
    k, k_s, k_b, k_g, k_out, alpha, v, v_s, v_b, v_g, v_out, beta,
    freqs, freq_s, positions, index, mscale, position, tokens, samples, groups,
    HEAD: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, INDEXED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """Grid: `launch.grid_of` of the blocks of tokens, and of samples * groups / HEADS."""
    if tl.program_id(2) == 0:
        _keys(
            k, k_s, k_b, k_g, k_out, alpha, freqs, freq_s, positions, index, mscale,
            position, tokens, samples, groups, HEAD, ROTARY, INTERLEAVED, WINDOW,
            PACKED, INDEXED, HEADS, BLOCK_S, BLOCK_H, BLOCK_P, ONE_AXIS,
        )  # fmt: skip
    else:
        shift_heads(
            v, v_s, v_b, v_g, v_out, beta,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, HEADS, BLOCK_S, BLOCK_D,
            ONE_AXIS,
        )  # fmt: skip


@triton.jit
def rope_shift_backward_kernel(
    k, k_s, k_b, k_g, dk, dk_s, dk_b, dk_g, k_grad, alpha, dalpha,
    v, v_s, v_b, v_g, dv, dv_s, dv_b, dv_g, v_grad, beta, dbeta,
    freqs, freq_s, positions, index, mscale, position, tokens, samples, groups,
    HEAD: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr,
    PACKED: tl.constexpr, INDEXED: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    ONE_AXIS: tl.constexpr,
):  # fmt: skip
    """Grid: as rope_shift_kernel's."""
    if tl.program_id(2) == 0:
        _keys_backward(
            k, k_s, k_b, k_g, dk, dk_s, dk_b, dk_g, k_grad, alpha, dalpha,
            freqs, freq_s, positions, index, mscale, position, tokens, samples, groups,
            HEAD, ROTARY, INTERLEAVED, WINDOW, PACKED, INDEXED, HEADS, BLOCK_S, BLOCK_H, BLOCK_P,
            ONE_AXIS,
        )  # fmt: skip
    else:
        shift_heads_backward(
            v, v_s, v_b, v_g, dv, dv_s, dv_b, dv_g, v_grad, beta, dbeta,
            position, tokens, samples, groups, HEAD, WINDOW, PACKED, HEADS, BLOCK_S, BLOCK_D,
            ONE_AXIS,
        )  # fmt: skip
