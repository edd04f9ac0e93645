"""Kernels of a mixture's experts: for few tokens, for many, and the sum of a token's parts.

Few tokens: every choice is a GEMV with its own expert's rows; no sort, no padding. The choices of a
token run beside each other: one after the other each would wait for memory. So that the second GEMV
is their sum, too, a program of it has a few columns of several choices.

Many tokens: choices are sorted by expert on the device, then a grouped GEMM. Nothing is counted on
the host: the grids are as large as any choice may need, and programs past the last tile return. A
tile is up to TOKENS choices of one expert, in the order of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gemm.epilogue import activate, finish
from ..gemm.gemv import rows_times
from ..gemm.weight import weight_tile
from ..pdl import pdl_wait


@triton.jit
def expert_gemv_kernel(
    x,
    indices,
    weight,
    epilogue,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """y [choices, N] = epilogue of row choice / K of x times the weight of the choice's expert.

    A program computes ROWS of the N columns of one choice; `x` are Rows.
    """
    pdl_wait(PROGRAMMATIC)
    choice = tl.program_id(0)
    expert = tl.load(indices + choice).to(tl.int64)
    row = x.data + (choice // K).to(tl.int64) * x.STEP
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = column < N
    rows = expert * weight.N + column
    if weight.HALVED:
        # Rows 2i and 2i + 1 of the tile are the gate's and up's of one column.
        pair = tl.arange(0, 2 * ROWS)
        of_pair = tl.program_id(1) * ROWS + pair // 2
        both = expert * weight.N + (pair % 2) * N + of_pair
        sums = rows_times(weight, both, of_pair < N, row, False, 2 * ROWS, BLOCK)
        total, up = tl.split(tl.reshape(sums, (ROWS, 2)))
    else:
        total = rows_times(weight, rows, inside, row, False, ROWS, BLOCK)
        up = total
    finish(epilogue, epilogue.y, total, up, choice, column, rows, inside, inside, N)


@triton.jit
def expert_sum_kernel(
    x,
    indices,
    weights,
    weight,
    bias,
    residual,
    out,
    K: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """out [T, N] = sum over j of weights[t, j] · part[t·K + j] + residual[t], in f32: a part is the
    choice's row of x times its expert's weight, with its bias.

    A program computes ROWS columns of one token, CHOICES of the K at once; `x` are Rows, residual's
    are STEP apart.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHOICES * ROWS)
    column = tl.program_id(1) * ROWS + lane % ROWS
    total = tl.zeros([ROWS], tl.float32)
    for first in tl.static_range(0, K, CHOICES):
        j = first + lane // ROWS
        live = (j < K) & (column < N)
        choice = token * K + j
        rows = tl.load(indices + choice, mask=j < K, other=0).to(tl.int64) * weight.N + column
        row = x.data + choice * x.STEP
        part = rows_times(weight, rows, live, row, True, CHOICES * ROWS, BLOCK)
        if bias is not None:
            part += tl.load(bias + rows, mask=live, other=0).to(tl.float32)
        part *= tl.load(weights + choice, mask=j < K, other=0).to(tl.float32)
        total += tl.sum(tl.reshape(part, (CHOICES, ROWS)), 0)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = at < N
    if residual is not None:
        total += tl.load(residual + token * STEP + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * N + at, total.to(out.dtype.element_ty), mask=inside)


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
def grouped_gemm_kernel(
    x,
    experts,
    places,
    weight,
    epilogue,
    K: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """y [choices, N] = epilogue of rows choice / K of x times the weight of the choice's expert,
    for one tile of choices and ROWS columns; `x` are Rows.

    The weight is the left operand: it has the rows that a matrix instruction wants however few the
    choices are, and each of them is summed in the same order.
    """
    pdl_wait(PROGRAMMATIC)
    expert = tl.load(experts + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    WIDTH: tl.constexpr = weight.K
    DTYPE: tl.constexpr = x.data.dtype.element_ty
    choice = tl.load(places + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))
    live = choice >= 0
    choice = tl.where(live, choice, 0)
    row = (choice // K).to(tl.int64) * x.STEP
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = column < N
    rows = expert * weight.N + column
    # In fragments gate and up rows are numbered alike.
    of_weight = expert * N + column if weight.TILES > 0 else rows
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = (at < WIDTH)[:, None] & live[None, :]
        value = tl.load(x.data + row[None, :] + at[:, None], mask=mask, other=0)
        w = weight_tile(
            weight, weight.data, weight.scales, of_weight, inside, start, 0, DTYPE, ROWS, BLOCK
        )
        total = tl.dot(w, value, total, input_precision="ieee")
        if weight.HALVED:
            w = weight_tile(
                weight, weight.data, weight.scales, of_weight, inside, start, 1, DTYPE, ROWS, BLOCK
            )
            up = tl.dot(w, value, up, input_precision="ieee")
    value = activate(epilogue, total, up, rows[:, None], inside[:, None], N)
    to = epilogue.y + choice[:, None].to(tl.int64) * epilogue.STEP + column[None, :]
    stored = live[:, None] & inside[None, :]
    tl.store(to, tl.trans(value.to(epilogue.y.dtype.element_ty)), mask=stored)


@triton.jit
def combine_kernel(
    parts,
    weights,
    residual,
    out,
    K: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """out [T, WIDTH] = sum over j of weights[t, j] · parts[t·K + j] + residual[t], in f32.

    A program computes BLOCK columns of one token; residual's rows are STEP apart.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        choice = token * K + j
        part = tl.load(parts + choice * WIDTH + at, mask=inside, other=0).to(tl.float32)
        total += part * tl.load(weights + choice).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + token * STEP + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * WIDTH + at, total.to(out.dtype.element_ty), mask=inside)
