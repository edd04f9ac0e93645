"""What looks along one dim: sums, means, extrema, softmax, top-k, gather, blocks rotated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import triton
import triton.language as tl

from ....compiler.target import Target
from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Operand, Ref, Result
from ..pdl import pdl_wait
from .copy import merged

_BLOCK = 4096
_PER_THREAD = 8
_FLOATS = ("f16", "bf16", "f32")
_INTEGERS = ("u8", "i8", "i16", "i32", "i64")


@triton.jit
def _line(index, SHAPE: tl.constexpr, STRIDES: tl.constexpr):
    """Where line `index` begins: a place in dims given innermost first, the outermost unsized."""
    left = index.to(tl.int64)
    at = left * 0
    for axis in tl.static_range(len(SHAPE)):
        at += left % SHAPE[axis] * STRIDES[axis]
        left = left // SHAPE[axis]
    return at + left * STRIDES[len(SHAPE)]


def _lines(x: Operand, axis: int, out: Operand) -> dict[str, Any]:
    """Constants that find the lines of x along `axis`, and what belongs to them in `out`, of which
    `axis` is dropped, one long, or as long as there is room."""
    rest = [d for d in range(len(x.shape)) if d != axis]
    kept = rest if len(out.shape) == len(x.shape) else range(len(rest))
    shape = tuple(x.shape[d] for d in rest)
    strides = (tuple(x.strides[d] for d in rest), tuple(out.strides[d] for d in kept))
    dims, (read, write) = merged(shape, *strides)
    return {"SHAPE": dims[:-1], "STRIDES": read, "OUT_STRIDES": write}


def _launch(
    query: KernelQuery, function: Any, outs: Sequence[str], constants: Mapping[str, Any], block: int
) -> Candidate | Declined:
    """A program a line of argument 0 along `dim`."""
    x = query.args[0]
    if x.packed or x.value is not None:
        return Declined(f"expected numbers in memory, found {x.type}")
    axis = query.attrs["dim"] % len(x.shape)
    lines = prod(n for d, n in enumerate(x.shape) if d != axis)
    if not lines:
        return Candidate((), 0.0, "no lines")
    args: dict[str, Ref | int | float] = {"x": Arg(0)}
    args |= {name: Result(i) for i, name in enumerate(outs)}
    out = query.results[0]
    call = Call(
        function,
        {
            **args,
            **_lines(x, axis, out),
            "N": x.shape[axis],
            "STEP": x.strides[axis],
            "BLOCK": block,
            **constants,
        },
        (lines, 1, 1),
        tuple(Result(i) for i in range(len(outs))),
        num_warps=_warps(block, query.target),
    )
    return Candidate((call,), query.seconds(1), "a program a line")


def _warps(block: int, target: Target) -> int:
    """Warps of a program whose threads hold _PER_THREAD elements of a block each."""
    return max(1, min(512, block // _PER_THREAD) // target.warp)


def _block(query: KernelQuery) -> int:
    size = query.args[0].shape[query.attrs["dim"] % len(query.args[0].shape)]
    return min(triton.next_power_of_2(size), _BLOCK)


def _unreadable(query: KernelQuery, dtypes: Sequence[str]) -> Declined | None:
    found = query.args[0].type
    if found.dtype in dtypes:
        return None
    return Declined(f"expected one of {', '.join(dtypes)}; found {found}")


# ---- sum, mean, amax


@triton.jit
def reduce_kernel(
    x,
    out,
    SHAPE: tl.constexpr,
    STRIDES: tl.constexpr,
    OUT_STRIDES: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A program reduces a line of N elements, STEP apart, in f32. NaN wins in amax."""
    pdl_wait(PROGRAMMATIC)
    line = tl.program_id(0)
    x += _line(line, SHAPE, STRIDES)
    out += _line(line, SHAPE, OUT_STRIDES)
    if KIND == "amax":
        most = tl.full((BLOCK,), float("-inf"), tl.float32)
        lost = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            y = tl.load(x + at * STEP, mask=at < N, other=float("-inf")).to(tl.float32)
            most = tl.maximum(most, y)
            lost = lost | (y != y).to(tl.int32)
        result = tl.where(tl.max(lost, 0) > 0, float("nan"), tl.max(most, 0))
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(x + at * STEP, mask=at < N, other=0.0).to(tl.float32)
        result = tl.sum(total, 0)
        if KIND == "mean":
            result = result / N
    tl.store(out, result.to(out.dtype.element_ty))


def reduced(query: KernelQuery) -> Candidate | Declined:
    """sum, mean and amax along one dim."""
    size = query.args[0].shape[query.attrs["dim"] % len(query.args[0].shape)]
    if not size:
        return Declined(f"{query.op.name} of no elements: {query.args[0].type}")
    constants = {"KIND": query.op.name}
    return _unreadable(query, _FLOATS) or _launch(
        query, reduce_kernel, ("out",), constants, _block(query)
    )


# ---- softmax


@triton.jit
def softmax_kernel(
    x,
    out,
    SHAPE: tl.constexpr,
    STRIDES: tl.constexpr,
    OUT_STRIDES: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    OUT_STEP: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A program a line of N elements, STEP apart: the largest, the sum of exponentials, the rest.

    A line longer than BLOCK is read three times.
    """
    pdl_wait(PROGRAMMATIC)
    line = tl.program_id(0)
    x += _line(line, SHAPE, STRIDES)
    out += _line(line, SHAPE, OUT_STRIDES)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in tl.range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + at * STEP, mask=at < N, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most, y)
    top = tl.max(most, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + at * STEP, mask=at < N, other=float("-inf")).to(tl.float32)
        total += tl.where(at < N, tl.exp(y - top), 0.0)
    scale = 1 / tl.sum(total, 0)
    for start in tl.range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + at * STEP, mask=at < N, other=float("-inf")).to(tl.float32)
        y = tl.exp(y - top) * scale
        tl.store(out + at * OUT_STEP, y.to(out.dtype.element_ty), mask=at < N)


def softmax(query: KernelQuery) -> Candidate | Declined:
    """softmax(x) along one dim."""
    axis = query.attrs["dim"] % len(query.args[0].shape)
    constants = {"OUT_STEP": query.results[0].strides[axis]}
    return _unreadable(query, _FLOATS) or _launch(
        query, softmax_kernel, ("out",), constants, _block(query)
    )


# ---- topk


@triton.jit
def topk_kernel(
    x,
    values,
    indices,
    SHAPE: tl.constexpr,
    STRIDES: tl.constexpr,
    OUT_STRIDES: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    OUT_STEP: tl.constexpr,
    TOP: tl.constexpr,
    FLOAT: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A program a line of N elements, which it holds: TOP times the largest of what is left.

    Of equals the first comes first; NaN comes before every number.
    """
    pdl_wait(PROGRAMMATIC)
    line = tl.program_id(0)
    x += _line(line, SHAPE, STRIDES)
    to = _line(line, SHAPE, OUT_STRIDES)
    at = tl.arange(0, BLOCK)
    y = tl.load(x + at * STEP, mask=at < N, other=0)
    if FLOAT:
        # An integer of the same order: the bits, those of negative numbers turned around.
        y = y.to(tl.float32)
        bits = tl.where(y == 0, 0.0, y).to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = tl.where(y != y, 0x7FFFFFFF, key).to(tl.int64)
    else:
        key = y.to(tl.int64)
    left = (at < N).to(tl.int32)
    for i in tl.range(0, TOP):
        # Only in a line of smallest numbers is what is taken as large as what is left.
        held = tl.where(left > 0, key, -0x7FFFFFFFFFFFFFFF - 1)
        top = tl.max(held, 0)
        place = tl.min(tl.where((held == top) & (left > 0), at, BLOCK), 0)
        left = tl.where(at == place, 0, left)
        tl.store(values + to + i * OUT_STEP, tl.load(x + place * STEP))
        tl.store(indices + to + i * OUT_STEP, place.to(tl.int64))


_LONGEST_HELD = 8192


def topk(query: KernelQuery) -> Candidate | Declined:
    """topk(x) along one dim."""
    x = query.args[0]
    axis = query.attrs["dim"] % len(x.shape)
    if x.shape[axis] > _LONGEST_HELD:
        return Declined(f"a line of {x.type} is longer than the {_LONGEST_HELD} that are held")
    constants = {
        "OUT_STEP": query.results[0].strides[axis],
        "TOP": query.attrs["k"],
        "FLOAT": x.type.dtype in _FLOATS,
    }
    block = triton.next_power_of_2(x.shape[axis])
    return _unreadable(query, (*_FLOATS, *_INTEGERS)) or _launch(
        query, topk_kernel, ("values", "indices"), constants, block
    )


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
    if not x.dense or not index.dense or x.packed:
        return Declined(f"x {x.type} or indices {index.type} are not dense")
    axis = query.attrs["dim"] % len(x.shape)
    count = prod(index.shape)
    if not count:
        return Candidate((), 0.0, "nothing to gather")
    block = 256
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
            "BLOCK": block,
        },
        (-(-count // block), 1, 1),
        (Result(0),),
    )
    return Candidate((call,), query.seconds(1), "element by element")


# ---- hadamard


@triton.jit
def hadamard_kernel(
    x,
    out,
    blocks,
    SCALE: tl.constexpr,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """TILE of the `blocks` blocks of SIZE = 2 ** STEPS elements: sums and differences of pairs, by
    one bit of the place after the other."""
    pdl_wait(PROGRAMMATIC)
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (block < blocks)[:, None] & (tl.arange(0, SIZE) < SIZE)[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(STEPS):
        # The last bit of the place is summed over, and becomes the first.
        a, b = tl.split(tl.reshape(y, (TILE, SIZE // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (TILE, SIZE))
    tl.store(out + at, (y * SCALE).to(out.dtype.element_ty), mask=inside)


_LARGEST_ROTATED = 8192


def hadamard(query: KernelQuery) -> Candidate | Declined:
    """hadamard(x): blocks of the last dim."""
    (x,) = query.args
    size = query.attrs["block"]
    if not x.dense or size > _LARGEST_ROTATED:
        return Declined(f"x {x.type} is not dense, or its blocks of {size} are too large")
    count = prod(x.shape) // size
    if not count:
        return Candidate((), 0.0, "no blocks")
    tile = max(1, 1024 // size)
    call = Call(
        hadamard_kernel,
        {
            "x": Arg(0),
            "out": Result(0),
            "blocks": count,
            "SCALE": size**-0.5,
            "SIZE": size,
            "STEPS": size.bit_length() - 1,
            "TILE": tile,
        },
        (-(-count // tile), 1, 1),
        (Result(0),),
        num_warps=max(128, min(512, size // 8)) // query.target.warp,
    )
    return _unreadable(query, _FLOATS) or Candidate((call,), query.seconds(1), "in registers")


TEMPLATES = {
    "sum": (reduced,),
    "mean": (reduced,),
    "amax": (reduced,),
    "softmax": (softmax,),
    "topk": (topk,),
    "gather": (gather,),
    "hadamard": (hadamard,),
}
