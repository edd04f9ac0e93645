"""Weights as kernels see them: dense matrices, MXFP4 by rows, or MXFP4 in fragments."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...kernel_query import Arg, Codes, KernelQuery, Scales
from .mxfp4_decode import decoded, e8m0, scaled_tile


class Weight(NamedTuple):
    """A weight [N, K], or several, HEAD elements (dense) or N rows (MXFP4) apart; in fragments so
    many rows as its tiles have.

    `data` are numbers, whose rows and columns are ROW and COLUMN elements apart, or MXFP4 codes; of
    these `scales` hold one for GROUP columns (0: dense), and with TILES both lie as fragments, so
    many tiles across (compiler.ops.mxfp4_fragments). Of a HALVED weight the first N / 2 rows are
    the gate's, the others the up's. SCALED says whether the target has scaled conversions.
    """

    data: Any
    scales: Any
    N: Any
    K: Any
    GROUP: Any
    SCALED: Any
    TILES: Any
    HALVED: Any
    ROW: Any
    COLUMN: Any
    HEAD: Any


def weight_of(
    query: KernelQuery,
    position: int,
    halved: bool = False,
    shape: tuple[int, int] | None = None,
    steps: tuple[int, int, int] | None = None,
) -> Weight:
    """Argument `position`, dense [..., N, K] unless it is packed, or `shape` (N, K) and `steps` (of
    a row, a column and a matrix) say how it lies."""
    held = query.args[position]
    n, k = shape or held.shape[-2:]
    row, column, head = steps or (k, 1, n * k)
    packed = held.packed
    if packed is None:
        return Weight(Arg(position), None, n, k, 0, False, 0, halved, row, column, head)
    tiles = packed.tiles[1] if packed.fragments else 0
    scaled = query.target.scaled_conversions
    data, scales = Codes(position), Scales(position)
    return Weight(data, scales, n, k, packed.group, scaled, tiles, halved, row, column, head)


@triton.jit
def tile_by_rows(
    weight,
    data,
    scales,
    rows,
    inside_rows,
    k,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[ROWS, BLOCK_K] of the rows `rows` from `data` and `scales` on, from column k; 0 outside."""
    K: tl.constexpr = weight.K
    GROUP: tl.constexpr = weight.GROUP
    start = rows.to(tl.int64)[:, None]
    if GROUP == 0:
        at = k + tl.arange(0, BLOCK_K)
        inside = inside_rows[:, None] & (at < K)[None, :]
        at = data + start * weight.ROW + at[None, :] * weight.COLUMN
        tile = tl.load(at, mask=inside, other=0.0)
    else:
        block = k // GROUP + tl.arange(0, BLOCK_K // GROUP)
        inside = inside_rows[:, None] & (block < K // GROUP)[None, :]
        scale = tl.load(scales + start * (K // GROUP) + block[None, :], mask=inside, other=127)
        if weight.SCALED:
            at = k // 8 + tl.arange(0, BLOCK_K // 8)
            inside = inside_rows[:, None] & (at < K // 8)[None, :]
            words = data.to(tl.pointer_type(tl.int32)) + start * (K // 8) + at[None, :]
            words = tl.load(words, mask=inside, other=0)
            tile = scaled_tile(words, scale, ROWS, BLOCK_K, GROUP, DTYPE)
        else:
            at = k // 2 + tl.arange(0, BLOCK_K // 2)
            inside = inside_rows[:, None] & (at < K // 2)[None, :]
            codes = tl.load(data + start * (K // 2) + at[None, :], mask=inside, other=0)
            tile = decoded(codes, scale, ROWS, BLOCK_K, GROUP, DTYPE)
    return tile


@triton.jit
def tile_of_fragments(
    weight,
    data,
    scales,
    rows,
    inside_rows,
    k,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As tile_by_rows. Row i is the i-th; of a HALVED weight the i-th of the gate's rows (HALF 0)
    or of the up's (1)."""
    TILES: tl.constexpr = weight.TILES
    if weight.HALVED:
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
    words = tl.load(data.to(tl.pointer_type(tl.int32)) + at, mask=inside, other=0)
    group = k // 32 + tl.arange(0, BLOCK_K // 32)
    tile = group // 4
    inside = inside_rows[:, None] & (tile < TILES)[None, :]
    in_tile = (rows % 8 * 8 + low * 2)[:, None] + (group // 2 % 2 * 4 + group % 2)[None, :]
    at = (first[:, None] + tile[None, :]) * 64 + in_tile
    scale = e8m0(tl.load(scales + at, mask=inside, other=127))
    # Columns 0, 2, 4, 6 are in the low half, 1, 3, 5, 7 in the high one.
    pairs = _four(words)
    both = tl.join(_number(pairs << 16), _number(pairs)) * 8.507059173023462e37
    number = tl.reshape(both, (ROWS, BLOCK_K // 32, 32)) * scale[:, :, None]
    return tl.reshape(number, (ROWS, BLOCK_K)).to(DTYPE)


@triton.jit
def _four(words):
    """i32 [..., 2, 2] of words i32: pairs of codes in order, each as the high bits of a bf16."""
    second = (words << 26) | ((words >> 6) & 0x03FFFFFF)
    fourth = ((words << 4) & -2122284672) | ((words >> 4) & 0x00400040)
    return tl.join(tl.join(words, words << 6), tl.join(second, fourth))


@triton.jit
def _number(high):
    """f32 of the code in the high 16 bits, 2^126 times too small."""
    return (high & -2118123520).to(tl.float32, bitcast=True)


@triton.jit
def weight_tile(
    weight,
    data,
    scales,
    rows,
    inside_rows,
    k,
    HALF: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[ROWS, BLOCK_K] of a Weight in DTYPE from column k on, zero outside; `data` and `scales` are
    its own, moved to one of several matrices. Of a HALVED weight HALF says which half has `rows`.
    """
    if weight.TILES > 0:
        found = tile_of_fragments(
            weight, data, scales, rows, inside_rows, k, HALF, DTYPE, ROWS, BLOCK_K
        )
    else:
        rows += HALF * (weight.N // 2)
        found = tile_by_rows(weight, data, scales, rows, inside_rows, k, DTYPE, ROWS, BLOCK_K)
    return found
