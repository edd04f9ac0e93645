"""Products with a weight, dense or in MXFP4, for few tokens and for many.

One kernel serves all: tiles of output columns and tokens, K summed in order in steps of a fixed
size, in f32. For few tokens the weight is the left operand, so that a tile is as narrow as the
tokens are few; a token's sums are the same however many others there are.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import triton
import triton.language as tl

from ....compiler.target import Target
from ...kernel_query import (
    Arg,
    Call,
    Candidate,
    Codes,
    Declined,
    KernelQuery,
    Operand,
    Ref,
    Result,
    Scales,
    present,
)
from ..pdl import pdl_wait
from ..rowwise.norms import row_step
from .activations import gated
from .fragment_linear import FEW, fragment_call
from .mfma_linear import mfma_call, takes
from .prologue import ProductInput, normed_input
from .weight_tiles import tile

_DTYPES = ("bf16", "f16", "f32")


@triton.jit
def product_kernel(
    x,
    w,
    scales,
    bias,
    residual,
    norm,
    y,
    tokens,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    TILES: tl.constexpr,
    X_STEP: tl.constexpr,
    X_HEAD: tl.constexpr,
    W_ROW: tl.constexpr,
    W_COLUMN: tl.constexpr,
    W_HEAD: tl.constexpr,
    RESIDUAL_STEP: tl.constexpr,
    Y_STEP: tl.constexpr,
    Y_HEAD: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    EPS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """y [tokens, N] = x [tokens, K] · wᵀ (+ bias, + residual), of one head (program_id(2)).

    With a GATE the weight is [2N, K], gate rows first, and y = act(gate) · up. With TILES it lies
    in so many tiles across, as fragments. NARROW multiplies w · xᵀ instead of x · wᵀ. With a `norm`
    rows of x are normed by it first: squares are added up as x is read, for a scale of the sums.
    """
    pdl_wait(PROGRAMMATIC)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(2).to(tl.int64)
    in_columns = columns < N
    in_rows = rows < tokens
    DTYPE: tl.constexpr = x.dtype.element_ty
    x_row = x + head * X_HEAD + rows.to(tl.int64)[:, None] * X_STEP
    if GROUP == 0:
        w_head = w + head * W_HEAD
        s_head = scales
    else:
        w_head = w + head * N * (K // 2)
        s_head = scales + head * N * (K // GROUP)
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
            gain = tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)
            xs = (wide * gain[None, :]).to(DTYPE)
        ws = tile(
            w_head,
            s_head,
            columns,
            in_columns,
            k,
            GATE is not None,
            0,
            DTYPE,
            N,
            K,
            GROUP,
            SCALED,
            TILES,
            W_ROW,
            W_COLUMN,
            BLOCK_N,
            BLOCK_K,
        )
        if NARROW:
            sums = tl.dot(ws, tl.trans(xs), sums, input_precision="ieee")
        else:
            sums = tl.dot(xs, tl.trans(ws), sums, input_precision="ieee")
        if GATE is not None:
            us = tile(
                w_head,
                s_head,
                columns,
                in_columns,
                k,
                True,
                1,
                DTYPE,
                N,
                K,
                GROUP,
                SCALED,
                TILES,
                W_ROW,
                W_COLUMN,
                BLOCK_N,
                BLOCK_K,
            )
            if NARROW:
                ups = tl.dot(us, tl.trans(xs), ups, input_precision="ieee")
            else:
                ups = tl.dot(xs, tl.trans(us), ups, input_precision="ieee")
    if NARROW:
        sums = tl.trans(sums)
        ups = tl.trans(ups)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + EPS)[:, None]
        sums *= scale
        if GATE is not None:
            ups *= scale
    if bias is not None:
        sums += tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if GATE is not None:
            ups += tl.load(bias + N + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if GATE is not None:
        sums = gated(sums, ups, GATE, ALPHA, LIMIT)
    inside = in_rows[:, None] & in_columns[None, :]
    row = rows.to(tl.int64)[:, None]
    if residual is not None:
        at = residual + row * RESIDUAL_STEP + columns[None, :]
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    to = y + head * Y_HEAD + row * Y_STEP + columns[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=inside)


def product_call(
    query: KernelQuery,
    x: Ref,
    x_steps: tuple[int, int],
    tokens: int,
    weight: int,
    y: Ref,
    y_steps: tuple[int, int],
    *,
    heads: int = 1,
    bias: Arg | None = None,
    residual: Arg | None = None,
    norm: Arg | None = None,
    gate: str | None = None,
    shape: tuple[int, int] | None = None,
    w_steps: tuple[int, int, int] = (0, 0, 0),
) -> Call | Declined:
    """The launch of a product with argument `weight`; steps are of a token and of a head.

    The weight is dense [..., N, K], or what `shape` (N, K) and `w_steps` (of a row, of a column, of
    a head) say. `norm` is the weight of an rms_norm of x's rows with the node's `eps`.
    """
    w = query.args[weight]
    if w.packed and w.packed.fragments and tokens <= FEW:
        return fragment_call(
            query,
            x,
            x_steps[0],
            tokens,
            weight,
            y,
            bias=bias,
            residual=residual,
            norm=norm,
            gate=gate,
        )
    if shape is None and takes(query, tokens, weight):
        assert norm is None, "see prologue.normed_input"
        return mfma_call(
            query, x, x_steps[0], tokens, weight, y, bias=bias, residual=residual, gate=gate
        )
    if w.type.dtype not in _DTYPES:
        return Declined(f"{w.type}: expected one of {', '.join(_DTYPES)}")
    if shape is None:
        if not w.dense:
            return Declined(f"the weight {w.type} is not dense")
        shape = w.shape[-2:]
        w_steps = (shape[1], 1, shape[0] * shape[1])
    n, k = shape
    n = n // 2 if gate else n
    few = tokens <= FEW
    block_n, block_t, warps, stages = _tiles(n, few, bool(gate), w, query.target)
    args: dict[str, Any] = {"x": x, "y": y, "tokens": tokens}
    constants: dict[str, Any] = {
        "K": k,
        "N": n,
        "GROUP": w.packed.group if w.packed else 0,
        "SCALED": w.packed is not None and query.target.scaled_conversions,
        "TILES": int(w.packed.codes.shape[1]) if w.packed and w.packed.fragments else 0,
        "X_STEP": x_steps[0],
        "X_HEAD": x_steps[1],
        "W_ROW": w_steps[0],
        "W_COLUMN": w_steps[1],
        "W_HEAD": w_steps[2],
        "Y_STEP": y_steps[0],
        "Y_HEAD": y_steps[1],
        "RESIDUAL_STEP": 0,
        "GATE": gate,
        "ALPHA": float(query.attrs.get("alpha", 0.0)),
        "LIMIT": float(query.attrs.get("limit", 0.0)),
        "EPS": 0.0 if norm is None else query.attrs["eps"],
        "NARROW": few,
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "BLOCK_K": 64 if w.type.dtype == "f32" else 128,
    }
    args["w"] = Codes(weight) if w.packed else Arg(weight)
    (args if w.packed else constants)["scales"] = Scales(weight) if w.packed else None
    if residual is not None:
        step = row_step(query.args[residual.index])
        if step is None:
            return Declined("the rows of the residual do not lie in one step")
        constants["RESIDUAL_STEP"] = step
    given, missing = present({"bias": bias, "residual": residual, "norm": norm})
    args |= given
    constants |= missing
    grid = (triton.cdiv(n, block_n), triton.cdiv(tokens, block_t), heads)
    return Call(product_kernel, args, grid, (y,), constants, warps, stages, overlaps=few)


def _tiles(
    n: int, few: bool, is_gated: bool, w: Operand, target: Target
) -> tuple[int, int, int, int]:
    """Columns and tokens of a tile, warps, stages."""
    if few and target.mfma:
        # A matrix instruction has 16 rows, and warps that have none repeat another's.
        return 64, FEW, 4, 2
    if few:
        return (32 if n >= 8192 else 16), FEW, 4, 3
    if w.type.dtype == "f32":
        # For sm_100 Triton 3.7 makes tf32 of exact f32 products with 64 rows or more.
        return 32, 32, 4, 2
    return (64 if is_gated or w.packed else 128), 64, 4, 2


def _chosen(query: KernelQuery, call: Call, given: ProductInput | None = None) -> Candidate:
    held = "MXFP4" if query.args[1].packed else query.args[1].type.dtype
    reason = f"{tiles_of(call)}, {held} weight"
    if given is None:
        return Candidate((call,), query.seconds(1), reason)
    calls = (*given.calls, call)
    return Candidate(calls, query.seconds(len(calls)), reason + given.note, given.temps)


def tiles_of(call: Call) -> str:
    """What kind of product a launch is, in words."""
    if "NARROW" not in call.constants:
        return "fragments in registers for few tokens"
    if call.constants["NARROW"]:
        return "narrow tiles for few tokens"
    return "square tiles for many tokens"


def fused_linear(query: KernelQuery) -> Candidate | Declined:
    """linear and fused_linear: prologue rows first, then the product with its epilogue."""
    found = normed_input(query)
    if isinstance(found, Declined):
        return found
    call = product_call(
        query,
        found.x,
        (found.step, 0),
        prod(query.args[0].shape[:-1]),
        1,
        Result(0),
        (query.results[0].shape[-1], 0),
        bias=query.ref("bias"),
        residual=query.ref("residual"),
        norm=found.norm,
    )
    return call if isinstance(call, Declined) else _chosen(query, call, found)


def gated_linear(query: KernelQuery) -> Candidate | Declined:
    """gated_linear: the same with gate and up rows in one program."""
    found = normed_input(query)
    if isinstance(found, Declined):
        return found
    call = product_call(
        query,
        found.x,
        (found.step, 0),
        prod(query.args[0].shape[:-1]),
        1,
        Result(0),
        (query.results[0].shape[-1], 0),
        bias=query.ref("bias"),
        gate=query.attrs["activation"],
        norm=found.norm,
    )
    return call if isinstance(call, Declined) else _chosen(query, call, found)


def head_linear(query: KernelQuery) -> Candidate | Declined:
    """head_linear: x [T, H, K], weight [H, N, K]; a grid over heads."""
    x, y = query.args[0], query.results[0]
    if x.strides[-1] != 1:
        return Declined("the rows of x are not dense")
    call = product_call(
        query,
        Arg(0),
        (x.strides[0], x.strides[1]),
        x.shape[0],
        1,
        Result(0),
        (y.strides[0], y.strides[1]),
        heads=x.shape[1],
    )
    return call if isinstance(call, Declined) else _chosen(query, call)


def matmul(query: KernelQuery) -> Candidate | Declined:
    """matmul: x [..., M, K] by y [..., K, N], a grid over the batch of either or both."""
    x, y, out = query.args[0], query.args[1], query.results[0]
    if x.strides[-1] != 1 or y.packed is not None:
        return Declined("the rows of x are not dense")
    steps = [_batch_step(o, out.shape[:-2]) for o in (x, y)]
    if None in steps:
        return Declined(f"{x.type} and {y.type} do not step through the batch evenly")
    (m, _), (k, n) = x.shape[-2:], y.shape[-2:]
    call = product_call(
        query,
        Arg(0),
        (x.strides[-2], steps[0] or 0),
        m,
        1,
        Result(0),
        (n, m * n),
        heads=prod(out.shape[:-2]),
        shape=(n, k),
        w_steps=(y.strides[-1], y.strides[-2], steps[1] or 0),
    )
    return call if isinstance(call, Declined) else _chosen(query, call)


def _batch_step(x: Operand, batch: tuple[int, ...]) -> int | None:
    """How far apart the matrices of x lie over `batch`: 0 if all share one, None if unevenly."""
    lead, strides = x.shape[:-2], x.strides[:-2]
    if prod(lead) == 1:
        return 0
    if lead != batch[len(batch) - len(lead) :] or prod(lead) != prod(batch):
        return None
    steps = [(size, step) for size, step in zip(lead, strides, strict=True) if size != 1]
    even = all(a == size * b for (_, a), (size, b) in pairwise(steps))
    return steps[-1][1] if even else None


TEMPLATES = {
    "matmul": (matmul,),
    "linear": (fused_linear,),
    "fused_linear": (fused_linear,),
    "gated_linear": (gated_linear,),
    "head_linear": (head_linear,),
}
