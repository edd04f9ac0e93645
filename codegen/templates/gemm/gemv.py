"""GEMV: rows of a weight times one vector, for kernels in which the weight is the traffic."""

from __future__ import annotations

import triton
import triton.language as tl

from .mxfp4_decode import e2m1, e8m0, scaled_numbers


@triton.jit
def rows_times(
    weight,
    rows,
    inside,
    x,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """f32 [ROWS]: the rows `rows` (i64 [ROWS], where `inside`) of a Weight times x [K], or each
    times an x of its own, where EACH: x is a pointer, or one a row.

    BLOCK columns are worked on at once; each, or eight or GROUP beside each other, is a sum of its
    own until the end, so the order of summation depends on K, BLOCK and the target alone. Loads are
    16 bytes a thread where K lets them.
    """
    WIDTH: tl.constexpr = weight.K
    GROUP: tl.constexpr = weight.GROUP
    if GROUP == 0:
        column = tl.arange(0, BLOCK)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        # Twice as many loads on their way: experts of DeepSeek-V2-Lite took 39 and 21 µs without,
        # 25 and 14 with it.
        for start in tl.range(0, WIDTH, BLOCK, loop_unroll_factor=2):
            at = start + column
            mask = inside[:, None] & (at < WIDTH)[None, :]
            value = _values(x, at, at < WIDTH, mask, EACH)
            w = tl.load(weight.data + rows[:, None] * WIDTH + at[None, :], mask=mask, other=0)
            total += w.to(tl.float32) * value
    elif weight.SCALED:
        WORDS: tl.constexpr = BLOCK // 8
        words = weight.data.to(tl.pointer_type(tl.int32))
        column = tl.arange(0, BLOCK)
        total = tl.zeros([ROWS, WORDS], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            word = start // 8 + tl.arange(0, WORDS)
            mask = inside[:, None] & (word < WIDTH // 8)[None, :]
            code = tl.load(words + rows[:, None] * (WIDTH // 8) + word[None, :], mask=mask, other=0)
            # A scale for every word, which has the words' layout; loads of equals are one.
            group = rows[:, None] * (WIDTH // GROUP) + (word // (GROUP // 8))[None, :]
            scale = e8m0(tl.load(weight.scales + group, mask=mask, other=127))
            code = tl.reshape(code, (ROWS, WORDS // 4, 2, 2))
            w = scaled_numbers(code, tl.reshape(scale, (ROWS, WORDS // 4, 2, 2)), tl.float32)
            at = start + column
            mask = inside[:, None] & (at < WIDTH)[None, :]
            part = tl.reshape(w, (ROWS, BLOCK)) * _values(x, at, at < WIDTH, mask, EACH)
            total += tl.sum(tl.reshape(part, (ROWS, WORDS, 8)), 2)
    else:
        # A thread holds whole groups, so that their sums are its own. x is taken 2^64 times too
        # large, so that products with codes, 2^126 times too small, stay normal numbers.
        HALF: tl.constexpr = GROUP // 2
        GROUPS: tl.constexpr = BLOCK // GROUP
        byte = tl.arange(0, HALF)
        both = tl.arange(0, GROUP)
        total = tl.zeros([ROWS, GROUPS], tl.float32)
        for start in range(0, WIDTH // GROUP, GROUPS):
            group = start + tl.arange(0, GROUPS)
            live = group < WIDTH // GROUP
            mask = inside[:, None] & live[None, :]
            at = rows[:, None, None] * (WIDTH // 2) + (group[:, None] * HALF + byte)[None, :, :]
            code = tl.load(weight.data + at, mask=mask[:, :, None], other=0).to(tl.int32)
            at = rows[:, None] * (WIDTH // GROUP) + group[None, :]
            scale = e8m0(tl.load(weight.scales + at, mask=mask, other=127))
            at = group[:, None] * GROUP + both
            if EACH:
                value = tl.load(x[:, None, None] + at, mask=mask[:, :, None], other=0)
                even, odd = tl.split(tl.reshape(value, (ROWS, GROUPS, HALF, 2)))
            else:
                value = tl.load(x + at, mask=live[:, None], other=0)[None, :, :]
                even, odd = tl.split(tl.reshape(value, (1, GROUPS, HALF, 2)))
            even = even.to(tl.float32) * 18446744073709551616.0
            odd = odd.to(tl.float32) * 18446744073709551616.0
            part = e2m1(code) * even + e2m1(code >> 4) * odd
            total += tl.sum(part, 2) * 4611686018427387904.0 * scale
    return tl.sum(total, 1)


@triton.jit
def _values(x, at, inside_columns, inside, EACH: tl.constexpr):
    """f32 [1 or ROWS, BLOCK] of x at the columns `at`; 0 outside."""
    if EACH:
        value = tl.load(x[:, None] + at[None, :], mask=inside, other=0)
    else:
        value = tl.load(x + at, mask=inside_columns, other=0)[None, :]
    return value.to(tl.float32)
