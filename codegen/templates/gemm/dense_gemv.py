"""GEMV: a dense weight times the rows of a few tokens, by multiply-adds; the weight is the traffic.

A program computes a few columns of y over all of K. Each lane loads 16 bytes of the weight at once
and adds up the products of those in f32; lanes and warps meet once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from ...kernel_query import Call, Declined
from ..pdl import pdl_join, pdl_launch
from .epilogue import finish
from .product import GemmLaunch, Product

# The most tokens: each takes a multiply-add for every element of the weight.
MOST = 4
_DTYPES = ("bf16", "f16", "f32")


@triton.jit
def gemv_kernel(
    x,
    weight,
    norm,
    epilogue,
    N: tl.constexpr,
    Y_HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """ROWS columns of y [TOKENS, N] = epilogue(x [TOKENS, K] · wᵀ), of one head (program_id(1)).

    `x` are Rows. BLOCK_K columns of the weight are taken at once; each has a sum of its own until
    the end. With a `norm` rows of x are normed by it first: squares are added up as x is read, for
    a scale of the sums. AHEAD says that the weight is a constant, which may be read before the
    launches before have ended: each step's weights are asked for one step ahead.
    """
    pdl_launch(PROGRAMMATIC)
    K: tl.constexpr = weight.K
    DTYPE: tl.constexpr = x.data.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < N
    x_head = x.data + head * x.HEAD
    w_row = weight.data + head * weight.HEAD + row.to(tl.int64)[:, None] * weight.ROW
    sums = ()
    ups = ()
    squares = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((ROWS, BLOCK_K), tl.float32),)
        if weight.HALVED:
            ups = ups + (tl.zeros((ROWS, BLOCK_K), tl.float32),)
        if norm is not None:
            squares = squares + (tl.zeros((BLOCK_K,), tl.float32),)
    column = tl.arange(0, BLOCK_K)
    if AHEAD:
        next_ws, next_us = _weights(weight, w_row, in_rows, column, N)
    pdl_join(PROGRAMMATIC)
    # Two steps without a loop between them: Triton 3.6 would take more registers for one.
    UNROLL: tl.constexpr = 2 if K > BLOCK_K and K <= 2 * BLOCK_K else 1
    for k in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        at = k + column
        in_k = at < K
        if AHEAD:
            ws = next_ws
            us = next_us
            next_ws, next_us = _weights(weight, w_row, in_rows, at + BLOCK_K, N)
        else:
            ws, us = _weights(weight, w_row, in_rows, at, N)
        ws = ws.to(tl.float32)
        us = us.to(tl.float32)
        if norm is not None:
            gain = tl.load(norm.weight + at, mask=in_k, other=0.0).to(tl.float32)
        new_sums = ()
        new_ups = ()
        new_squares = ()
        for t in tl.static_range(TOKENS):
            xs = tl.load(x_head + t * x.STEP + at, mask=in_k, other=0.0).to(tl.float32)
            if norm is not None:
                new_squares = new_squares + (squares[t] + xs * xs,)
                xs = (xs * gain).to(DTYPE).to(tl.float32)
            new_sums = new_sums + (sums[t] + ws * xs[None, :],)
            if weight.HALVED:
                new_ups = new_ups + (ups[t] + us * xs[None, :],)
        sums = new_sums
        ups = new_ups
        squares = new_squares
    y = epilogue.y + head * Y_HEAD
    for t in tl.static_range(TOKENS):
        total = tl.sum(sums[t], 1)
        up = total
        if weight.HALVED:
            up = tl.sum(ups[t], 1)
        if norm is not None:
            scale = tl.rsqrt(tl.sum(squares[t], 0) / K + norm.EPS)
            total *= scale
            up *= scale
        finish(epilogue, y, total, up, row * 0 + t, row, row, in_rows, in_rows, N)


@triton.jit
def _weights(weight, w_row, in_rows, at, N: tl.constexpr):
    """Columns `at` of the rows at `w_row`, zero outside; of a HALVED weight those of the gate and
    those of the up, otherwise the same twice."""
    inside = in_rows[:, None] & (at < weight.K)[None, :]
    ws = tl.load(w_row + at[None, :], mask=inside, other=0.0)
    us = ws
    if weight.HALVED:
        us = tl.load(w_row + N * weight.ROW + at[None, :], mask=inside, other=0.0)
    return ws, us


def variant(product: Product) -> Iterator[GemmLaunch | Declined]:
    """One launch for very few tokens and a dense weight whose rows lie in one piece."""
    held, weight = product.held, product.weight
    if product.packed or held.type.dtype not in _DTYPES:
        yield Declined(f"GEMV: expected a dense weight of {', '.join(_DTYPES)}, found {held.type}")
    elif product.tokens > MOST:
        yield Declined(f"GEMV: {product.tokens} tokens, expected at most {MOST}")
    elif weight.COLUMN != 1:
        yield Declined("GEMV: the rows of the weight do not lie in one piece")
    else:
        one_row, rows = (_launch(product, warps, sums) for warps, sums in ((4, 1), (8, 8)))
        yield GemmLaunch(rows, "gemv", "GEMV for very few tokens", " of rows")
        yield GemmLaunch(
            one_row, "gemv", "GEMV for very few tokens, one row a program", " of a row"
        )


def _launch(product: Product, warps: int, sums: int) -> Call:
    """A launch whose programs have `warps` warps, and rows for at most `sums` sums: a row has one a
    token, or two where it is a gate's. One row they have at least."""
    weight, target = product.weight, product.query.target
    of_row = triton.next_power_of_2(product.tokens) * (2 if weight.HALVED else 1)
    # Few rows, so that a small product fills the device too.
    rows = max(min(sums // of_row, 4 if product.n * product.heads >= 4096 else 2), 1)
    args = {
        "x": product.x,
        "weight": weight,
        "norm": product.norm,
        "epilogue": product.epilogue,
        "N": product.n,
        "Y_HEAD": product.y_head,
        "TOKENS": product.tokens,
        "ROWS": rows,
        # Eight columns a lane; no more than there are, but for whole warps.
        "BLOCK_K": min(8 * warps * target.warp, max(triton.next_power_of_2(weight.K), 128)),
        "AHEAD": product.held.constant,
    }
    grid = (triton.cdiv(product.n, rows), product.heads, 1)
    return Call(gemv_kernel, args, grid, (product.epilogue.y,), num_warps=warps)
