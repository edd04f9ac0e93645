"""GEMM in tiles of output columns and tokens, for any weight, few tokens and many.

K is summed in order in steps of a fixed size, in f32. For few tokens the weight is the left
operand, so that a tile is as narrow as the tokens are few; a token's sums are the same however many
others there are.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from ...kernel_query import Call, Declined
from ..pdl import pdl_wait
from .epilogue import finish
from .mfma_linear import on_matrix_cores
from .product import FEW, GemmLaunch, Product
from .weight import weight_tile

_DTYPES = ("bf16", "f16", "f32")


@triton.jit
def product_kernel(
    x,
    weight,
    norm,
    epilogue,
    tokens,
    N: tl.constexpr,
    Y_HEAD: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A tile of y [tokens, N] = epilogue(x [tokens, K] · wᵀ), of one head (program_id(2)).

    `x` are Rows. NARROW multiplies w · xᵀ instead of x · wᵀ. With a `norm` rows of x are normed by
    it first: squares are added up as x is read, for a scale of the sums.
    """
    pdl_wait(PROGRAMMATIC)
    K: tl.constexpr = weight.K
    DTYPE: tl.constexpr = x.data.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(2).to(tl.int64)
    in_columns = columns < N
    in_rows = rows < tokens
    x_row = x.data + head * x.HEAD + rows.to(tl.int64)[:, None] * x.STEP
    if weight.GROUP == 0:
        data = weight.data + head * weight.HEAD
        scales = weight.scales
    elif weight.TILES > 0:
        tiles = head * ((weight.N + 15) // 16 * weight.TILES)
        data = weight.data + tiles * 1024
        scales = weight.scales + tiles * 64
    else:
        data = weight.data + head * weight.N * (K // 2)
        scales = weight.scales + head * weight.N * (K // weight.GROUP)
    if NARROW:
        sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        ups = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    else:
        sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        ups = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if norm is not None:
        squares = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        inside = in_rows[:, None] & (at < K)[None, :]
        xs = tl.load(x_row + at[None, :], mask=inside, other=0.0)
        if norm is not None:
            wide = xs.to(tl.float32)
            squares += wide * wide
            gain = tl.load(norm.weight + at, mask=at < K, other=0.0).to(tl.float32)
            xs = (wide * gain[None, :]).to(DTYPE)
        ws = weight_tile(weight, data, scales, columns, in_columns, k, 0, DTYPE, BLOCK_N, BLOCK_K)
        if NARROW:
            sums = tl.dot(ws, tl.trans(xs), sums, input_precision="ieee")
        else:
            sums = tl.dot(xs, tl.trans(ws), sums, input_precision="ieee")
        if weight.HALVED:
            us = weight_tile(
                weight, data, scales, columns, in_columns, k, 1, DTYPE, BLOCK_N, BLOCK_K
            )
            if NARROW:
                ups = tl.dot(us, tl.trans(xs), ups, input_precision="ieee")
            else:
                ups = tl.dot(xs, tl.trans(us), ups, input_precision="ieee")
    if NARROW:
        sums = tl.trans(sums)
        ups = tl.trans(ups)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + norm.EPS)[:, None]
        sums *= scale
        ups *= scale
    y = epilogue.y + head * Y_HEAD
    column = columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    finish(epilogue, y, sums, ups, rows[:, None], column, column, in_columns[None, :], inside, N)


def variant(product: Product) -> Iterator[GemmLaunch | Declined]:
    """Narrow tiles for few tokens, square tiles for any number."""
    held, target = product.held, product.query.target
    if held.type.dtype not in _DTYPES:
        yield Declined(f"{held.type}: expected one of {', '.join(_DTYPES)}")
        return
    if not product.few:
        yield Declined(f"narrow tiles: {product.tokens} tokens, expected at most {FEW}")
    elif product.norm is not None and not on_matrix_cores(product.query, product.tokens):
        yield Declined("narrow tiles: the kernel that keeps to registers norms rows once for all")
    elif target.mfma:
        # A matrix instruction has 16 rows, and warps that have none repeat another's.
        yield _launch(product, True, FEW, 64, 4, 2)
    else:
        yield _launch(product, True, FEW, 32 if product.n >= 8192 else 16, 4, 3)
    if product.norm is not None:
        yield Declined("square tiles: a norm within is for few tokens")
    elif held.type.dtype == "f32":
        # For sm_100 Triton 3.7 makes tf32 of exact f32 products with 64 rows or more.
        yield _launch(product, False, 32, 32, 4, 2)
    else:
        columns = 64 if product.weight.HALVED or product.packed else 128
        yield _launch(product, False, 64, columns, 4, 2)


def _launch(
    product: Product, narrow: bool, block_t: int, block_n: int, warps: int, stages: int
) -> GemmLaunch:
    grid = (triton.cdiv(product.n, block_n), triton.cdiv(product.tokens, block_t), product.heads)
    call = Call(
        product_kernel,
        {
            "x": product.x,
            "weight": product.weight,
            "norm": product.norm,
            "epilogue": product.epilogue,
            "tokens": product.tokens,
            "N": product.n,
            "Y_HEAD": product.y_head,
            "NARROW": narrow,
            "BLOCK_T": block_t,
            "BLOCK_N": block_n,
            "BLOCK_K": 64 if product.held.type.dtype == "f32" else 128,
        },
        grid,
        (product.epilogue.y,),
        num_warps=warps,
        num_stages=stages,
        overlaps=product.few,
    )
    if narrow:
        return GemmLaunch(call, "narrow", "narrow tiles for few tokens")
    return GemmLaunch(call, "square", "square tiles for many tokens")
