"""Elements by indices along one dim: gathered, and written to."""

from __future__ import annotations

from math import prod

import triton
import triton.language as tl

from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Operand, Result
from ..pdl import pdl_wait
from .copy import copy_call

_BLOCK = 256


def _unreadable(x: Operand, index: Operand) -> Declined | None:
    """Why no kernel reads the operands; None where they are read."""
    if x.packed or x.value is not None or not index.dense:
        return Declined(f"expected x in memory and dense indices; found {x.type}, {index.type}")
    return None


# ---- gather: result[.., i, ..] = x[.., index[.., i, ..], ..]


@triton.jit
def gather_kernel(
    x,
    index,
    out,
    count,
    ROWS: tl.constexpr,
    PICKED: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """x is [outer, ROWS, INNER], index and out [outer, PICKED, INNER]: `count` elements, dense. An
    index outside the rows, which no caller gives, reads row 0."""
    pdl_wait(PROGRAMMATIC)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(index + at, mask=inside, other=0)
    row = tl.where((row >= 0) & (row < ROWS), row, 0)
    outer = at // (PICKED * INNER)
    value = tl.load(x + (outer * ROWS + row) * INNER + at % INNER, mask=inside)
    tl.store(out + at, value, mask=inside)


def gather(query: KernelQuery) -> Candidate | Declined:
    """gather(x, index) along one dim."""
    x, index = query.args
    if bad := _unreadable(x, index):
        return bad
    if not x.dense:
        return Declined(f"expected a dense x, found strides {x.strides}")
    axis = query.attrs["dim"] % len(x.shape)
    count = prod(index.shape)
    if not count:
        return Candidate((), 0.0, "nothing to gather")
    call = Call(
        gather_kernel,
        {
            "x": Arg(0),
            "index": Arg(1),
            "out": Result(0),
            "count": count,
            "ROWS": x.shape[axis],
            "PICKED": index.shape[axis],
            "INNER": prod(x.shape[axis + 1 :]),
            "BLOCK": _BLOCK,
        },
        (-(-count // _BLOCK), 1, 1),
        (Result(0),),
    )
    return Candidate((call,), query.seconds(1), "element by element")


# ---- scatter: result = x, and result[.., index[.., i, ..], ..] = value


@triton.jit
def scatter_kernel(
    index,
    out,
    count,
    ROWS: tl.constexpr,
    PICKED: tl.constexpr,
    INNER: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """out is [outer, ROWS, INNER], index [outer, PICKED, INNER]: `count` elements, dense. An index
    outside the rows, which no caller gives, is written nowhere."""
    pdl_wait(PROGRAMMATIC)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(index + at, mask=inside, other=-1)
    inside = inside & (row >= 0) & (row < ROWS)
    outer = at // (PICKED * INNER)
    to = out + (outer * ROWS + row) * INNER + at % INNER
    if out.dtype.element_ty.is_floating():
        value = tl.full((BLOCK,), VALUE, tl.float32).to(out.dtype.element_ty)
    else:
        value = tl.full((BLOCK,), VALUE, out.dtype.element_ty)
    tl.store(to, value, mask=inside)


def scatter(query: KernelQuery) -> Candidate | Declined:
    """scatter(x, index) of a number along one dim."""
    x, index = query.args
    (out,) = query.results
    if bad := _unreadable(x, index):
        return bad
    if not out.dense or x.type.dtype == "f64":
        return Declined(f"expected a dense result of at most 32 bits a float, found {out.type}")
    axis = query.attrs["dim"] % len(x.shape)
    calls = copy_call(Arg(0), x, Result(0), out.strides)
    if count := prod(index.shape):
        args = {
            "index": Arg(1),
            "out": Result(0),
            "count": count,
            "ROWS": x.shape[axis],
            "PICKED": index.shape[axis],
            "INNER": prod(x.shape[axis + 1 :]),
            "VALUE": query.attrs["value"],
            "BLOCK": _BLOCK,
        }
        grid = (-(-count // _BLOCK), 1, 1)
        calls = (*calls, Call(scatter_kernel, args, grid, (Result(0),)))
    return Candidate(calls, query.seconds(len(calls)), "a copy, and element by element")


TEMPLATES = {"gather": (gather,), "scatter": (scatter,)}
