"""Rows of a weight times one vector, for kernels in which the weight is the traffic."""

from __future__ import annotations

import triton
import triton.language as tl

from .mxfp4_decode import e2m1, e8m0


@triton.jit
def rows_times(
    weight,
    scales,
    rows,
    inside,
    x,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """f32 [ROWS]: the rows `rows` (i64 [ROWS], where `inside`) of weight [..., WIDTH] times x.

    `weight` points to numbers; or with GROUP to MXFP4 codes, and `scales` to their scales. BLOCK
    columns are worked on at once; each is a sum of its own until the end, so the order of summation
    depends on WIDTH and BLOCK alone. Loads are 16 bytes a thread where WIDTH lets them.
    """
    if GROUP == 0:
        column = tl.arange(0, BLOCK)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            at = start + column
            value = tl.load(x + at, mask=at < WIDTH, other=0).to(tl.float32)
            mask = inside[:, None] & (at < WIDTH)[None, :]
            w = tl.load(weight + rows[:, None] * WIDTH + at[None, :], mask=mask, other=0)
            total += w.to(tl.float32) * value[None, :]
    else:
        # A word holds eight codes. x is taken 2^64 times too large, so that products with codes,
        # 2^126 times too small, stay normal numbers.
        words = weight.to(tl.pointer_type(tl.int32))
        column = tl.arange(0, BLOCK // 8)
        nibble = tl.arange(0, 8)
        total = tl.zeros([ROWS, BLOCK // 8], tl.float32)
        for start in range(0, WIDTH // 8, BLOCK // 8):
            at = start + column
            live = at < WIDTH // 8
            place = at[:, None] * 8 + nibble[None, :]
            value = tl.load(x + place, mask=live[:, None], other=0).to(tl.float32)
            value = value * 18446744073709551616.0
            mask = inside[:, None] & live[None, :]
            word = tl.load(words + rows[:, None] * (WIDTH // 8) + at[None, :], mask=mask, other=0)
            code = word[:, :, None] >> (4 * nibble)[None, None, :]
            part = tl.sum(e2m1(code) * value[None, :, :], 2)
            group = at // (GROUP // 8)
            scale_at = scales + rows[:, None] * (WIDTH // GROUP) + group[None, :]
            scale = e8m0(tl.load(scale_at, mask=mask, other=127))
            total += part * 4611686018427387904.0 * scale
    return tl.sum(total, 1)
