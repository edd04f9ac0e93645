"""Contexts in splits: where each begins, what it leaves of its rows, and how the rest is joined."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..pdl import pdl_wait

LOG2E = tl.constexpr(1.4426950408889634)


class Splits(NamedTuple):
    """COUNT parts of a context, for split-K (BLOCK: the power of 2 that holds them): they are SPLIT
    positions long, and after every STEADY of them their length doubles. So there are enough for
    every multiprocessor at short contexts, and not too many at long ones."""

    COUNT: Any
    SPLIT: Any
    STEADY: Any
    BLOCK: Any


class Parts(NamedTuple):
    """What the splits of a context made: f32 `sums` of weighted values [T, H, splits, V], and of
    their weights `totals`, and the greatest scores `tops` (log2) [T, H, splits]."""

    sums: Any
    tops: Any
    totals: Any
    V: Any


class Join(NamedTuple):
    """How splits are joined: M rows, V dims of each, and AT_ONCE splits at once."""

    M: Any
    V: Any
    AT_ONCE: Any


@triton.jit
def split_start(index, splits):
    """The first position of split `index` (i32)."""
    STEADY: tl.constexpr = splits.STEADY
    length = (index * 0 + splits.SPLIT) << (index // STEADY)
    return length * (index % STEADY + STEADY) - splits.SPLIT * STEADY


def splits_of(context: int, split: int, steady: int) -> int:
    """How many splits a context of `context` positions has."""
    count, start = 0, 0
    while start < context:
        start += split << (count // steady)
        count += 1
    return count


@triton.jit
def joined(
    parts,
    variant,
    splits,
    join,
    out,
    token,
    head,
    at,
    mine,
    padding,
    first,
    HEADS: tl.constexpr,
):
    """Dims from `first` on of rows of `out` [T, H, V], of the splits that each row sees: `token`,
    `head`, position `at` and whether a row is `mine`, all [M]. Those of `padding` [M] are 0.

    Splits are loaded some at once and added up one after the other, so that a row's sum depends on
    its own position alone.
    """
    V: tl.constexpr = parts.V
    dim = first + tl.arange(0, join.V)
    inside = (dim < V)[None, :]
    place = token.to(tl.int64) * HEADS + head
    index = tl.arange(0, splits.BLOCK)
    seen = mine[:, None] & (split_start(index, splits)[None, :] <= at[:, None])
    if variant.WINDOW:
        oldest = at - variant.WINDOW + 1
        seen = seen & (split_start(index + 1, splits)[None, :] > oldest[:, None])
    where = place[:, None] * splits.COUNT + index[None, :]
    top = tl.load(parts.tops + where, mask=seen, other=float("-inf"), cache_modifier=".cg")
    base = tl.max(top, 1)
    if variant.sinks is not None:
        sink = tl.load(variant.sinks + head, mask=mine, other=0.0).to(tl.float32) * LOG2E
        base = tl.maximum(base, sink)
    # A row of others has no top: its weights are 0, not NaN.
    base = tl.where(base == float("-inf"), 0.0, base)
    whole = base * 0
    acc = tl.zeros([join.M, join.V], tl.float32)
    low = tl.min(tl.where(seen, index[None, :], splits.COUNT), 1)
    high = tl.max(tl.where(seen, index[None, :] + 1, 0), 1)
    for some in range(tl.min(low, 0), tl.max(high, 0), join.AT_ONCE):
        scores = ()
        weights = ()
        values = ()
        for i in tl.static_range(join.AT_ONCE):
            here = (low <= some + i) & (some + i < high)
            to = place * splits.COUNT + some + i
            to_value = to[:, None] * V + dim[None, :]
            mask = here[:, None] & inside
            score = tl.load(parts.tops + to, mask=here, other=float("-inf"), cache_modifier=".cg")
            total = tl.load(parts.totals + to, mask=here, other=0.0, cache_modifier=".cg")
            value = tl.load(parts.sums + to_value, mask=mask, other=0.0, cache_modifier=".cg")
            scores = scores + (score,)
            weights = weights + (total,)
            values = values + (value,)
        for i in tl.static_range(join.AT_ONCE):
            weight = tl.exp2(scores[i] - base)
            whole += weights[i] * weight
            acc += values[i] * weight[:, None]
    if variant.sinks is not None:
        whole += tl.exp2(sink - base)
    result = tl.where(padding[:, None], 0.0, acc / whole[:, None]).to(out.dtype.element_ty)
    stored = (mine | padding)[:, None] & inside
    tl.store(out + place[:, None] * V + dim[None, :], result, mask=stored)


@triton.jit
def combine_kernel(
    parts, pages, variant, splits, join, out, HEADS: tl.constexpr, PROGRAMMATIC: tl.constexpr
):
    """Program (token, head, block of V): out [T, H, V] of the splits that the token sees; 0 for a
    token of slot -1. Blocks beyond V do nothing."""
    pdl_wait(PROGRAMMATIC)
    one = tl.arange(0, 1)
    token = tl.program_id(0) + one
    head = tl.program_id(1) + one
    slot = tl.load(pages.slots + token)
    at = tl.load(pages.positions + token)
    first = tl.program_id(2) * join.V
    joined(parts, variant, splits, join, out, token, head, at, slot >= 0, slot < 0, first, HEADS)
