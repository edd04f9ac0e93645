"""Experts for many tokens: choices sorted by expert on the device, then products tile by tile.

Nothing is counted on the host: the grids are as large as any choice may need, and programs past the
last tile return. A tile is up to TOKENS choices of one expert, in the order of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gemm.activations import activated, gated
from ..gemm.weight_tiles import weight_tile
from ..pdl import pdl_wait


@triton.jit
def count_kernel(indices, counts, choices, CHUNK: tl.constexpr, PROGRAMMATIC: tl.constexpr):
    """counts i32 [E]: how many of the `choices` indices name the expert of this program."""
    pdl_wait(PROGRAMMATIC)
    expert = tl.program_id(0)
    total = tl.zeros([CHUNK], tl.int32)
    for start in range(0, choices, CHUNK):
        at = start + tl.arange(0, CHUNK)
        total += (tl.load(indices + at, mask=at < choices, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(total, 0))


@triton.jit
def place_kernel(
    indices,
    counts,
    experts,
    places,
    choices,
    tiles,
    COUNT: tl.constexpr,
    BINS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """experts i32 [tiles]: whose each tile is, -1 for tiles that are not needed; places i32
    [tiles, TOKENS]: the choices in each tile, -1 behind the last. A program does one expert's, of
    COUNT; BINS is the power of 2 that holds them.
    """
    pdl_wait(PROGRAMMATIC)
    expert = tl.program_id(0)
    one = tl.arange(0, BINS)
    needed = (tl.load(counts + one, mask=one < COUNT, other=0) + TOKENS - 1) // TOKENS
    first = tl.sum(tl.where(one < expert, needed, 0), 0)
    mine = tl.sum(tl.where(one == expert, needed, 0), 0)
    for start in range(0, mine, CHUNK):
        at = start + tl.arange(0, CHUNK)
        tl.store(experts + first + at, tl.zeros([CHUNK], tl.int32) + expert, mask=at < mine)
    if expert == COUNT - 1:
        for start in range(first + mine, tiles, CHUNK):
            at = start + tl.arange(0, CHUNK)
            tl.store(experts + at, tl.full([CHUNK], -1, tl.int32), mask=at < tiles)
    row = places + first * TOKENS
    seen = 0
    for start in range(0, choices, CHUNK):
        at = start + tl.arange(0, CHUNK)
        hit = (tl.load(indices + at, mask=at < choices, other=-1) == expert).to(tl.int32)
        before = seen + tl.cumsum(hit, 0) - hit
        tl.store(row + before, at, mask=hit != 0)
        seen += tl.sum(hit, 0)
    behind = seen + tl.arange(0, TOKENS)
    tl.store(row + behind, tl.full([TOKENS], -1, tl.int32), mask=behind < mine * TOKENS)


@triton.jit
def hidden_tile_kernel(
    x,
    experts,
    places,
    weight,
    scales,
    bias,
    hidden,
    K: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """hidden [T·K, INNER] = activation(gate) · up, for one tile of choices and ROWS columns.

    The weight is the left operand: it has the rows that a matrix instruction wants however few the
    choices are, and each of them is summed in the same order. x's rows are STEP apart.
    """
    pdl_wait(PROGRAMMATIC)
    expert = tl.load(experts + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    choice = tl.load(places + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))
    live = choice >= 0
    choice = tl.where(live, choice, 0)
    row = x + (choice // K).to(tl.int64) * STEP
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = column < INNER
    rows = expert * ((2 if GATED else 1) * INNER) + column
    dtype: tl.constexpr = x.dtype.element_ty
    gate = tl.zeros([ROWS, TOKENS], tl.float32)
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = (at < WIDTH)[:, None] & live[None, :]
        value = tl.load(row[None, :] + at[:, None], mask=mask, other=0)
        w = weight_tile(
            weight, scales, rows, inside, start, dtype, WIDTH, GROUP, SCALED, WIDTH, 1, ROWS, BLOCK
        )
        gate = tl.dot(w, value, gate, input_precision="ieee")
        if GATED:
            w = weight_tile(
                weight,
                scales,
                rows + INNER,
                inside,
                start,
                dtype,
                WIDTH,
                GROUP,
                SCALED,
                WIDTH,
                1,
                ROWS,
                BLOCK,
            )
            up = tl.dot(w, value, up, input_precision="ieee")
    if bias is not None:
        gate += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)[:, None]
    gate = gate.to(dtype).to(tl.float32)
    if GATED:
        if bias is not None:
            up += tl.load(bias + rows + INNER, mask=inside, other=0).to(tl.float32)[:, None]
        y = gated(gate, up.to(dtype).to(tl.float32), ACTIVATION, ALPHA, LIMIT)
    else:
        y = activated(gate, ACTIVATION)
    out = hidden + choice[:, None].to(tl.int64) * INNER + column[None, :]
    tl.store(out, tl.trans(y.to(dtype)), mask=live[:, None] & inside[None, :])


@triton.jit
def part_tile_kernel(
    hidden,
    experts,
    places,
    weight,
    scales,
    bias,
    parts,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """parts [T·K, WIDTH] = down product of hidden [T·K, INNER] + bias, for one tile of choices and
    ROWS columns."""
    pdl_wait(PROGRAMMATIC)
    expert = tl.load(experts + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    choice = tl.load(places + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))
    live = choice >= 0
    choice = tl.where(live, choice, 0).to(tl.int64)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = column < WIDTH
    rows = expert * WIDTH + column
    dtype: tl.constexpr = hidden.dtype.element_ty
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, INNER, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = (at < INNER)[:, None] & live[None, :]
        value = tl.load(hidden + choice[None, :] * INNER + at[:, None], mask=mask, other=0)
        w = weight_tile(
            weight, scales, rows, inside, start, dtype, INNER, GROUP, SCALED, INNER, 1, ROWS, BLOCK
        )
        total = tl.dot(w, value, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)[:, None]
    out = parts + choice[:, None] * WIDTH + column[None, :]
    tl.store(out, tl.trans(total.to(dtype)), mask=live[:, None] & inside[None, :])
