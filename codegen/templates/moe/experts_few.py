"""Experts for few tokens: every choice reads its own expert's rows; no sorting, no padding.

The choices of a token run beside each other: one after the other they would wait for memory by
turns. experts_sum adds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gemm.activations import activated, gated
from ..gemm.gemv import rows_times
from ..pdl import pdl_wait


@triton.jit
def hidden_kernel(
    x,
    indices,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """hidden [T·K, INNER] = activation(gate) · up of the expert that choice t·K + j names.

    A program computes ROWS of the INNER columns of one choice; x has rows of WIDTH, STEP apart.
    """
    pdl_wait(PROGRAMMATIC)
    choice = tl.program_id(0)
    expert = tl.load(indices + choice).to(tl.int64)
    row = x + (choice // K).to(tl.int64) * STEP
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    out = hidden + choice.to(tl.int64) * INNER + place
    if GATED:
        # Rows 2i and 2i + 1 of the tile are the gate's and up's of one column.
        pair = tl.arange(0, 2 * ROWS)
        column = tl.program_id(1) * ROWS + pair // 2
        rows = expert * (2 * INNER) + (pair % 2) * INNER + column
        inside = column < INNER
        h = rows_times(weight, scales, rows, inside, row, WIDTH, GROUP, SCALED, 2 * ROWS, BLOCK)
        if bias is not None:
            h += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)
        h = h.to(hidden.dtype.element_ty).to(tl.float32)
        gate, up = tl.split(tl.reshape(h, (ROWS, 2)))
        y = gated(gate, up, ACTIVATION, ALPHA, LIMIT)
    else:
        rows = expert * INNER + place
        inside = place < INNER
        h = rows_times(weight, scales, rows, inside, row, WIDTH, GROUP, SCALED, ROWS, BLOCK)
        if bias is not None:
            h += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)
        h = h.to(hidden.dtype.element_ty).to(tl.float32)
        y = activated(h, ACTIVATION)
    tl.store(out, y.to(hidden.dtype.element_ty), mask=place < INNER)


@triton.jit
def part_kernel(
    hidden,
    indices,
    weight,
    scales,
    bias,
    parts,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """parts [T·K, WIDTH] = the chosen expert's down product of hidden [T·K, INNER] + bias.

    A program computes ROWS of the WIDTH columns of one choice.
    """
    pdl_wait(PROGRAMMATIC)
    choice = tl.program_id(0)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = place < WIDTH
    rows = tl.load(indices + choice).to(tl.int64) * WIDTH + place
    row = hidden + choice.to(tl.int64) * INNER
    part = rows_times(weight, scales, rows, inside, row, INNER, GROUP, SCALED, ROWS, BLOCK)
    if bias is not None:
        part += tl.load(bias + rows, mask=inside, other=0).to(tl.float32)
    at = parts + choice.to(tl.int64) * WIDTH + place
    tl.store(at, part.to(parts.dtype.element_ty), mask=inside)
