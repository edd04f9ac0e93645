"""Any strided view copied to any other of the same shape."""

from __future__ import annotations

import triton
import triton.language as tl

from ..request import Arg, Call, Chosen, Request, Result

BLOCK = 1024


@triton.jit
def copy_kernel(
    source,
    target,
    count,
    SHAPE: tl.constexpr,
    SOURCE_STRIDES: tl.constexpr,
    TARGET_STRIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target[i] = source[i] for `count` elements; shape and strides are given innermost first."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    left = index
    at = index * 0
    to = index * 0
    for axis in tl.static_range(len(SHAPE)):
        place = left % SHAPE[axis]
        left = left // SHAPE[axis]
        at += place * SOURCE_STRIDES[axis]
        to += place * TARGET_STRIDES[axis]
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


def copy(request: Request) -> Chosen:
    """Result 0 = argument 0, element by element."""
    source, target = request.args[0], request.results[0]
    shape, (read, write) = merged(source.shape, source.strides, target.strides)
    count = int(source.type.numel)
    call = Call(
        copy_kernel,
        {"source": Arg(0), "target": Result(0), "count": count},
        (-(-count // BLOCK), 1, 1),
        (Result(0),),
        {"SHAPE": shape, "SOURCE_STRIDES": read, "TARGET_STRIDES": write, "BLOCK": BLOCK},
    )
    return Chosen((call,), request.seconds(1), "strided copy")
