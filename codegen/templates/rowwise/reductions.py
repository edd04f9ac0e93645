"""What looks along one dim: sums, means, extrema, softmax, top-k, blocks rotated."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Result
from ..pdl import pdl_wait
from .arithmetic import ordered
from .copy import merged

_BLOCK = 4096
_PER_THREAD = 8
_FLOATS = ("f16", "bf16", "f32")
_INTEGERS = ("u8", "i8", "i16", "i32", "i64")


class Lines(NamedTuple):
    """Lines of N elements, STEP apart. They begin where STRIDES say of the other dims, of sizes
    SHAPE, all innermost first and the outermost unsized; what is made of them at OUT_STRIDES."""

    x: Any
    N: Any
    STEP: Any
    SHAPE: Any
    STRIDES: Any
    OUT_STRIDES: Any


@triton.jit
def _line(index, SHAPE: tl.constexpr, STRIDES: tl.constexpr):
    """Where line `index` begins."""
    left = index.to(tl.int64)
    at = left * 0
    for axis in tl.static_range(len(SHAPE)):
        at += left % SHAPE[axis] * STRIDES[axis]
        left = left // SHAPE[axis]
    return at + left * STRIDES[len(SHAPE)]


def _launch(
    query: KernelQuery, function: Any, dtypes: Sequence[str] = _FLOATS, **constants: Any
) -> Candidate | Declined:
    """A program a line of argument 0 along `dim`. Results have no such dim, or one that is one
    long, or as long as there is room."""
    x, out = query.args[0], query.results[0]
    if x.type.dtype not in dtypes or x.packed or x.value is not None:
        return Declined(f"expected one of {', '.join(dtypes)} in memory; found {x.type}")
    axis = query.attrs["dim"] % len(x.shape)
    rest = [d for d in range(len(x.shape)) if d != axis]
    kept = rest if len(out.shape) == len(x.shape) else range(len(rest))
    shape = tuple(x.shape[d] for d in rest)
    if not prod(shape):
        return Candidate((), 0.0, "no lines")
    strides = (tuple(x.strides[d] for d in rest), tuple(out.strides[d] for d in kept))
    dims, (read, write) = merged(shape, *strides)
    block = min(triton.next_power_of_2(x.shape[axis]), constants.pop("BLOCK", _BLOCK))
    results = [Result(i) for i in range(len(query.results))]
    args = {
        "lines": Lines(Arg(0), x.shape[axis], x.strides[axis], dims[:-1], read, write),
        **dict(zip(("out", "indices"), results, strict=False)),
        "BLOCK": block,
        **constants,
    }
    # Threads hold _PER_THREAD elements of a block each.
    warps = max(1, min(512, block // _PER_THREAD) // query.target.warp)
    call = Call(function, args, (prod(shape), 1, 1), tuple(results), num_warps=warps)
    return Candidate((call,), query.seconds(1), "a program a line")


# ---- sum, mean, amax


@triton.jit
def reduce_kernel(lines, out, BLOCK: tl.constexpr, KIND: tl.constexpr, PROGRAMMATIC: tl.constexpr):
    """A program reduces a line in f32. NaN wins in amax."""
    pdl_wait(PROGRAMMATIC)
    line = tl.program_id(0)
    N: tl.constexpr = lines.N
    x = lines.x + _line(line, lines.SHAPE, lines.STRIDES)
    out += _line(line, lines.SHAPE, lines.OUT_STRIDES)
    if KIND == "amax":
        most = tl.full((BLOCK,), float("-inf"), tl.float32)
        lost = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            y = tl.load(x + at * lines.STEP, mask=at < N, other=float("-inf")).to(tl.float32)
            most = tl.maximum(most, y)
            lost = lost | (y != y).to(tl.int32)
        result = tl.where(tl.max(lost, 0) > 0, float("nan"), tl.max(most, 0))
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(x + at * lines.STEP, mask=at < N, other=0.0).to(tl.float32)
        result = tl.sum(total, 0)
        if KIND == "mean":
            result = result / N
    tl.store(out, result.to(out.dtype.element_ty))


def reduced(query: KernelQuery) -> Candidate | Declined:
    """sum, mean and amax along one dim."""
    size = query.args[0].shape[query.attrs["dim"] % len(query.args[0].shape)]
    if not size:
        return Declined(f"{query.op.name} of no elements: {query.args[0].type}")
    return _launch(query, reduce_kernel, KIND=query.op.name)


# ---- argmax


@triton.jit
def _key(y):
    """Numbers as i64 in the same order, NaN above all."""
    if y.dtype.is_floating():
        key = ordered(y.to(tl.float32)).to(tl.int64)
    else:
        key = y.to(tl.int64)
    return key


@triton.jit
def argmax_kernel(lines, out, BLOCK: tl.constexpr, PROGRAMMATIC: tl.constexpr):
    """A program a line: where its largest is, of equals the first."""
    pdl_wait(PROGRAMMATIC)
    line = tl.program_id(0)
    N: tl.constexpr = lines.N
    x = lines.x + _line(line, lines.SHAPE, lines.STRIDES)
    best = tl.full((BLOCK,), -0x7FFFFFFFFFFFFFFF - 1, tl.int64)
    place = tl.arange(0, BLOCK)
    for start in tl.range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = _key(tl.load(x + at * lines.STEP, mask=at < N, other=0))
        more = (key > best) & (at < N)
        best = tl.where(more, key, best)
        place = tl.where(more, at, place)
    first = tl.min(tl.where(best == tl.max(best, 0), place, N), 0)
    tl.store(out + _line(line, lines.SHAPE, lines.OUT_STRIDES), first.to(tl.int64))


def argmax(query: KernelQuery) -> Candidate | Declined:
    """argmax(x) along one dim."""
    size = query.args[0].shape[query.attrs["dim"] % len(query.args[0].shape)]
    if not size:
        return Declined(f"argmax of no elements: {query.args[0].type}")
    return _launch(query, argmax_kernel, (*_FLOATS, *_INTEGERS))


# ---- softmax


@triton.jit
def softmax_kernel(
    lines, out, BLOCK: tl.constexpr, OUT_STEP: tl.constexpr, PROGRAMMATIC: tl.constexpr
):
    """A program a line: the largest, the sum of exponentials, the rest.

    A line longer than BLOCK is read three times.
    """
    pdl_wait(PROGRAMMATIC)
    line = tl.program_id(0)
    N: tl.constexpr = lines.N
    x = lines.x + _line(line, lines.SHAPE, lines.STRIDES)
    out += _line(line, lines.SHAPE, lines.OUT_STRIDES)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in tl.range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + at * lines.STEP, mask=at < N, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most, y)
    top = tl.max(most, 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + at * lines.STEP, mask=at < N, other=float("-inf")).to(tl.float32)
        total += tl.where(at < N, tl.exp(y - top), 0.0)
    scale = 1 / tl.sum(total, 0)
    for start in tl.range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x + at * lines.STEP, mask=at < N, other=float("-inf")).to(tl.float32)
        y = tl.exp(y - top) * scale
        tl.store(out + at * OUT_STEP, y.to(out.dtype.element_ty), mask=at < N)


def softmax(query: KernelQuery) -> Candidate | Declined:
    """softmax(x) along one dim."""
    axis = query.attrs["dim"] % len(query.args[0].shape)
    return _launch(query, softmax_kernel, OUT_STEP=query.results[0].strides[axis])


# ---- topk


@triton.jit
def topk_kernel(
    lines,
    out,
    indices,
    BLOCK: tl.constexpr,
    OUT_STEP: tl.constexpr,
    TOP: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """A program a line, which it holds: TOP times the largest of what is left.

    Of equals the first comes first; NaN comes before every number.
    """
    pdl_wait(PROGRAMMATIC)
    line = tl.program_id(0)
    x = lines.x + _line(line, lines.SHAPE, lines.STRIDES)
    to = _line(line, lines.SHAPE, lines.OUT_STRIDES)
    at = tl.arange(0, BLOCK)
    y = tl.load(x + at * lines.STEP, mask=at < lines.N, other=0)
    key = _key(y)
    left = (at < lines.N).to(tl.int32)
    for i in tl.range(0, TOP):
        # Only in a line of smallest numbers is what is taken as large as what is left.
        held = tl.where(left > 0, key, -0x7FFFFFFFFFFFFFFF - 1)
        top = tl.max(held, 0)
        place = tl.min(tl.where((held == top) & (left > 0), at, BLOCK), 0)
        left = tl.where(at == place, 0, left)
        tl.store(out + to + i * OUT_STEP, tl.load(x + place * lines.STEP))
        tl.store(indices + to + i * OUT_STEP, place.to(tl.int64))


_LONGEST_HELD = 8192


def topk(query: KernelQuery) -> Candidate | Declined:
    """topk(x) along one dim."""
    x = query.args[0]
    axis = query.attrs["dim"] % len(x.shape)
    if x.shape[axis] > _LONGEST_HELD:
        return Declined(f"a line of {x.type} is longer than the {_LONGEST_HELD} that are held")
    step, top = query.results[0].strides[axis], query.attrs["k"]
    dtypes = (*_FLOATS, *_INTEGERS)
    return _launch(query, topk_kernel, dtypes, BLOCK=_LONGEST_HELD, OUT_STEP=step, TOP=top)


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
    if not x.dense or size > _LARGEST_ROTATED or x.type.dtype not in _FLOATS:
        return Declined(f"x {x.type} is not dense floats, or its blocks of {size} are too large")
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
    return Candidate((call,), query.seconds(1), "in registers")


TEMPLATES = {
    "sum": (reduced,),
    "mean": (reduced,),
    "amax": (reduced,),
    "argmax": (argmax,),
    "softmax": (softmax,),
    "topk": (topk,),
    "hadamard": (hadamard,),
}
