"""Tiles of a weight as numbers inside a kernel: dense, in MXFP4 by rows, or in MXFP4 fragments."""

from __future__ import annotations

import triton
import triton.language as tl

from .mxfp4_decode import decoded, e8m0, scaled_tile


@triton.jit
def weight_tile(
    w,
    scales,
    rows,
    inside_rows,
    k,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    W_ROW: tl.constexpr,
    W_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[ROWS, BLOCK_K] of a weight [N, K] from column k on, zero outside; GROUP 0 is dense.

    SCALED says whether the target has scaled conversions.
    """
    start = rows.to(tl.int64)[:, None]
    if GROUP == 0:
        at = k + tl.arange(0, BLOCK_K)
        inside = inside_rows[:, None] & (at < K)[None, :]
        tile = tl.load(w + start * W_ROW + at[None, :] * W_COLUMN, mask=inside, other=0.0)
    else:
        block = k // GROUP + tl.arange(0, BLOCK_K // GROUP)
        inside = inside_rows[:, None] & (block < K // GROUP)[None, :]
        scale = tl.load(scales + start * (K // GROUP) + block[None, :], mask=inside, other=127)
        if SCALED:
            at = k // 8 + tl.arange(0, BLOCK_K // 8)
            inside = inside_rows[:, None] & (at < K // 8)[None, :]
            words = w.to(tl.pointer_type(tl.int32)) + start * (K // 8) + at[None, :]
            words = tl.load(words, mask=inside, other=0)
            tile = scaled_tile(words, scale, ROWS, BLOCK_K, GROUP, DTYPE)
        else:
            at = k // 2 + tl.arange(0, BLOCK_K // 2)
            inside = inside_rows[:, None] & (at < K // 2)[None, :]
            codes = tl.load(w + start * (K // 2) + at[None, :], mask=inside, other=0)
            tile = decoded(codes, scale, ROWS, BLOCK_K, GROUP, DTYPE)
    return tile


@triton.jit
def fragment_tile(
    w,
    scales,
    rows,
    inside_rows,
    k,
    HALVED: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As weight_tile, of a weight in TILES tiles across (see compiler.ops.mxfp4_fragments).

    Row i is the i-th; of a HALVED weight the i-th of the gate's (HALF 0) or the up's rows (1).
    """
    if HALVED:
        down = rows // 8
        low = rows * 0 + HALF
    else:
        down = rows // 16
        low = rows // 8 % 2
    first = down.to(tl.int64) * TILES
    word = k // 8 + tl.arange(0, BLOCK_K // 8)
    tile = word // 16
    inside = inside_rows[:, None] & (tile < TILES)[None, :]
    in_tile = (low * 128 + rows % 8 * 16)[:, None] + (word % 4 * 4 + word // 4 % 4)[None, :]
    at = (first[:, None] + tile[None, :]) * 256 + in_tile
    words = tl.load(w.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
    group = k // 32 + tl.arange(0, BLOCK_K // 32)
    tile = group // 4
    inside = inside_rows[:, None] & (tile < TILES)[None, :]
    at = (first[:, None] + tile[None, :]) * 64 + (rows % 8 * 8 + low * 4)[:, None] + group % 4
    scale = e8m0(tl.load(scales + at, mask=inside, other=127))
    # Columns 0, 2, 4, 6 are in the low half, 1, 3, 5, 7 in the high one.
    both = tl.join(_four(words << 16), _four(words & -65536))
    number = tl.reshape(both, (ROWS, BLOCK_K // 32, 32)) * scale[:, :, None]
    return tl.reshape(number, (ROWS, BLOCK_K)).to(DTYPE)


@triton.jit
def _four(half):
    """f32 [..., 2, 2] of the four codes in the high 16 bits of words, in order."""
    bits = half & -2118123520
    first = bits.to(tl.float32, bitcast=True)
    bits = (half << 3) & -2118123520
    second = bits.to(tl.float32, bitcast=True)
    bits = (half << 6) & -2118123520
    third = bits.to(tl.float32, bitcast=True)
    bits = ((half << 1) & -2147483648) | ((half >> 3) & 25165824) | ((half >> 7) & 4194304)
    fourth = bits.to(tl.float32, bitcast=True)
    return tl.join(tl.join(first, third), tl.join(second, fourth)) * 8.507059173023462e37


@triton.jit
def tile(
    w,
    scales,
    rows,
    inside_rows,
    k,
    HALVED: tl.constexpr,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    TILES: tl.constexpr,
    W_ROW: tl.constexpr,
    W_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile of a weight in whichever way it is held: in TILES of fragments, or by rows.

    HALVED it is [2N, K], and HALF says whether `rows` are of its first N or of the others.
    """
    if TILES > 0:
        found = fragment_tile(
            w, scales, rows, inside_rows, k, HALVED, HALF, DTYPE, TILES, ROWS, BLOCK_K
        )
    else:
        found = weight_tile(
            w,
            scales,
            rows + HALF * N,
            inside_rows,
            k,
            DTYPE,
            K,
            GROUP,
            SCALED,
            W_ROW,
            W_COLUMN,
            ROWS,
            BLOCK_K,
        )
    return found
