"""Any strided view copied to any other of the same shape, or into a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl

from ...kernel_query import Arg, Call, Candidate, Declined, KernelQuery, Operand, Ref, Result
from ..pdl import pdl_wait

BLOCK = 1024


@triton.jit
def copy_kernel(
    source,
    target,
    units,
    UNIT: tl.constexpr,
    SHAPE: tl.constexpr,
    SOURCE_STRIDES: tl.constexpr,
    TARGET_STRIDES: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """target[SKIP + i] = source[i] for units · UNIT elements.

    Strides are given innermost first, and so are the sizes of all dims but the outermost.
    """
    pdl_wait(PROGRAMMATIC)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < units.to(tl.int64) * UNIT
    left = index
    at = index * 0
    to = index * 0 + SKIP
    for axis in tl.static_range(len(SHAPE)):
        place = left % SHAPE[axis]
        left = left // SHAPE[axis]
        at += place * SOURCE_STRIDES[axis]
        to += place * TARGET_STRIDES[axis]
    at += left * SOURCE_STRIDES[len(SHAPE)]
    to += left * TARGET_STRIDES[len(SHAPE)]
    tl.store(target + to, tl.load(source + at, mask=inside), mask=inside)


def merged(
    shape: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Shape and strides innermost first, with every dim joined to the next that it runs on into."""
    dims: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in reversed(range(len(shape))):
        size = shape[axis]
        if size == 1:
            continue
        runs_on = dims and all(
            s[axis] == step[-1] * dims[-1] for s, step in zip(strides, steps, strict=True)
        )
        if runs_on:
            dims[-1] *= size
            continue
        dims.append(size)
        for s, step in zip(strides, steps, strict=True):
            step.append(s[axis])
    if not dims:
        return (1,), tuple((1,) for _ in strides)
    return tuple(dims), tuple(map(tuple, steps))


def unit_of(count: int) -> int:
    """The largest power of two, up to a vector, that `count` is a multiple of.

    A masked load is one of vectors where the count is known to be a multiple of them.
    """
    return next(u for u in (16, 8, 4, 2, 1) if count % u == 0)


def copy_call(
    source: Ref, operand: Operand, target: Ref, strides: Sequence[int], skip: int = 0
) -> tuple[Call, ...]:
    """The launch that copies `source`, which lies as `operand`, to `target`: under `strides`, from
    element `skip` on. No launch where there is nothing to copy."""
    count = prod(operand.shape)
    if not count:
        return ()
    shape, (read, write) = merged(operand.shape, operand.strides, tuple(strides))
    unit = unit_of(count)
    args = {
        "source": source,
        "target": target,
        "units": count // unit,
        "UNIT": unit,
        "SHAPE": shape[:-1],
        "SOURCE_STRIDES": read,
        "TARGET_STRIDES": write,
        "SKIP": skip,
        "BLOCK": BLOCK,
    }
    return (Call(copy_kernel, args, (-(-count // BLOCK), 1, 1), (target,)),)


def copy(query: KernelQuery) -> Candidate:
    """Result 0 = argument 0, element by element."""
    calls = copy_call(Arg(0), query.args[0], Result(0), query.results[0].strides)
    return Candidate(calls, query.seconds(len(calls)), "strided copy")


def cat(query: KernelQuery) -> Candidate | Declined:
    """cat(parts..., dim): each part is copied to its place."""
    (whole,) = query.results
    if bad := _unreadable(query):
        return Declined(bad)
    axis = query.attrs["dim"] % len(whole.shape)
    calls: list[Call] = []
    start = 0
    for i, part in enumerate(query.args):
        calls += copy_call(Arg(i), part, Result(0), whole.strides, start * whole.strides[axis])
        start += part.shape[axis]
    return Candidate(tuple(calls), query.seconds(len(calls)), "a copy a part")


def slice_scatter(query: KernelQuery) -> Candidate | Declined:
    """slice_scatter(x, src): a copy of x, and src copied into it."""
    x, src = query.args
    (whole,) = query.results
    if bad := _unreadable(query):
        return Declined(bad)
    axis = query.attrs["dim"] % len(whole.shape)
    strides = list(whole.strides)
    skip = query.attrs["start"] * strides[axis]
    strides[axis] *= query.attrs.get("step", 1)
    calls = (
        *copy_call(Arg(0), x, Result(0), whole.strides),
        *copy_call(Arg(1), src, Result(0), strides, skip),
    )
    return Candidate(calls, query.seconds(len(calls)), "two copies")


def _unreadable(query: KernelQuery) -> str:
    """Why the operands cannot be copied; empty where they can."""
    for o in query.args:
        if o.packed or o.value is not None:
            return f"{o.type} is {'packed' if o.packed else 'a number'}: there is nothing to copy"
    return ""


TEMPLATES = {"cat": (cat,), "slice_scatter": (slice_scatter,)}
