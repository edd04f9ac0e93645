"""Experts for few tokens: every choice is a GEMV with its own expert's rows; no sort, no padding.

The choices of a token run beside each other: one after the other each would wait for memory.
`experts_sum` adds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gemm.epilogue import finish
from ..gemm.gemv import rows_times
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
        sums = rows_times(weight, both, of_pair < N, row, 2 * ROWS, BLOCK)
        total, up = tl.split(tl.reshape(sums, (ROWS, 2)))
    else:
        total = rows_times(weight, rows, inside, row, ROWS, BLOCK)
        up = total
    finish(epilogue, epilogue.y, total, up, choice, column, rows, inside, inside, N)
