"""Rows normalised: rms_norm, layer_norm, and what products do to their input first."""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl

from ...kernel_query import (
    Arg,
    Call,
    Candidate,
    Declined,
    KernelQuery,
    Operand,
    Ref,
    Result,
    even_step,
    not_floats,
)
from ..pdl import pdl_wait
from .row_norm import InputRows, scales_of_row, store_row

# Rows up to this many elements stay in registers; longer ones are read again for each pass.
_IN_REGISTERS = 8192
# f32 elements of a row that a thread holds.
_PER_THREAD = 8


# ---- prologue: s = x (+ delta, or + rms_norm(delta, post_norm)); n = rms_norm(s, norm)


@triton.jit
def prologue_kernel(rows, n, s, K: tl.constexpr, BLOCK: tl.constexpr, PROGRAMMATIC: tl.constexpr):
    """n and s, dense [T, K], of InputRows, a program a row; s is rounded before it is normed.

    A row longer than BLOCK is read in blocks, once for each sum of squares and once to write.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    post_scale, scale = scales_of_row(rows, token, K, BLOCK)
    store_row(rows, token, post_scale, scale, n, s, 0, K, K, BLOCK)


def row_step(x: Operand) -> int | None:
    """How far apart the rows of x [..., K] lie, in elements; None where that is not one number, or
    where a row's own elements do not lie one after the other."""
    if x.packed or x.value is not None or not x.shape:
        return None
    *lead, width = x.shape
    if width > 1 and x.strides[-1] != 1:
        return None
    return width if prod(lead) == 1 else even_step(lead, x.strides[:-1])


def row_launch(width: int, warp: int) -> tuple[int, int]:
    """The block of a row of `width` elements that a program holds, and its warps (`warp` lanes)."""
    block = min(triton.next_power_of_2(width), _IN_REGISTERS)
    return block, max(1, min(512 // warp, block // (warp * _PER_THREAD)))


def input_rows(
    query: KernelQuery, eps: float | None, post_eps: float | None, norm: str = "norm"
) -> InputRows:
    """Argument 0, x [..., K], with the node's operands `delta`, `post_norm` and the one called
    `norm`, where it has them. An `eps` without it is a norm without a weight."""
    delta = query.operand("delta")
    return InputRows(
        Arg(0),
        query.ref("delta"),
        query.ref(norm),
        query.ref("post_norm"),
        row_step(query.args[0]) or 0,
        (row_step(delta) or 0) if delta else 0,
        eps is not None,
        eps or 0.0,
        post_eps or 0.0,
    )


def prologue_call(
    query: KernelQuery,
    n: Ref | None,
    s: Ref | None,
    eps: float | None,
    post_eps: float | None = None,
    norm: str = "norm",
) -> Call | Declined:
    """The launch of a prologue (compiler/ops/prologue.py) for all rows of argument 0.

    `n` and `s` are where its results go, dense, in x's dtype (None: not wanted); see input_rows for
    the rest. Declined where rows cannot be read as they lie.
    """
    x, delta = query.args[0], query.operand("delta")
    weights = [w for name in ("post_norm", norm) if (w := query.operand(name))]
    apart = row_step(x) is None or (delta and row_step(delta) is None)
    if apart or not all(w.dense for w in weights):
        return Declined(f"rows of x {x.type}, its delta or weights do not lie in one step")
    if odd := not_floats((x, *weights)):
        return odd
    block, warps = row_launch(x.shape[-1], query.target.warp)
    return rows_call(input_rows(query, eps, post_eps, norm), x.shape, n, s, block, warps)


def rows_call(
    rows: InputRows, shape: tuple[int, ...], n: Ref | None, s: Ref | None, block: int, warps: int
) -> Call:
    """The launch that computes n and s of rows of x [..., K], `block` elements at a time."""
    return Call(
        prologue_kernel,
        {"rows": rows, "n": n, "s": s, "K": shape[-1], "BLOCK": block},
        (prod(shape[:-1]), 1, 1),
        tuple(ref for ref in (n, s) if ref is not None),
        num_warps=warps,
    )


def _of_rows(query: KernelQuery, call: Call | Declined) -> Candidate | Declined:
    if isinstance(call, Declined):
        return call
    if not call.grid[0]:
        return Candidate((), 0.0, "no rows")
    return Candidate((call,), query.seconds(1), "a program a row")


def rms_norm(query: KernelQuery) -> Candidate | Declined:
    """rms_norm(x, weight?)."""
    call = prologue_call(query, Result(0), None, query.attrs["eps"], norm="weight")
    return _of_rows(query, call)


def add_rms_norm(query: KernelQuery) -> Candidate | Declined:
    """add_rms_norm(x, delta, weight): the sum, and its norm."""
    if (ranks := query.attrs.get("ranks", 1)) != 1:
        return Declined(f"the sum is one over {ranks} ranks")
    call = prologue_call(query, Result(1), Result(0), query.attrs["eps"], norm="weight")
    return _of_rows(query, call)


# ---- layer_norm


@triton.jit
def layer_norm_kernel(
    x,
    weight,
    bias,
    out,
    K: tl.constexpr,
    STEP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A program a row of K elements, STEP apart; weight and bias may be None.

    The variance is that of the differences from the mean: two passes.
    """
    pdl_wait(PROGRAMMATIC)
    row = tl.program_id(0).to(tl.int64)
    x += row * STEP
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / K
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        away = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32) - mean
        squares += tl.where(at < K, away * away, 0.0)
    scale = tl.rsqrt(tl.sum(squares, 0) / K + EPS)
    for start in tl.range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < K
        y = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean) * scale
        if weight is not None:
            y = y * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            y = y + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * K + at, y.to(out.dtype.element_ty), mask=inside)


def layer_norm(query: KernelQuery) -> Candidate | Declined:
    """layer_norm(x, weight?, bias?)."""
    x, *affine = query.args
    step = row_step(x)
    if step is None or not all(a.dense for a in affine):
        return Declined(f"rows of x {x.type} or its weights do not lie in one step")
    if odd := not_floats(query.args):
        return odd
    block, warps = row_launch(x.shape[-1], query.target.warp)
    call = Call(
        layer_norm_kernel,
        {
            "x": Arg(0),
            "weight": query.ref("weight"),
            "bias": query.ref("bias"),
            "out": Result(0),
            "K": x.shape[-1],
            "STEP": step,
            "EPS": query.attrs["eps"],
            "BLOCK": block,
        },
        (prod(x.shape[:-1]), 1, 1),
        (Result(0),),
        num_warps=warps,
    )
    return _of_rows(query, call)


TEMPLATES = {
    "rms_norm": (rms_norm,),
    "add_rms_norm": (add_rms_norm,),
    "layer_norm": (layer_norm,),
}
