"""Parts of contexts, as several programs make them, and what joins them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..pdl import pdl_join, pdl_launch
from .attend import LOG2E


class Parts(NamedTuple):
    """What the COUNT parts of a context made: f32 `sums` of weighted values [T, H, COUNT, V], and
    of their weights `totals`, and the greatest scores `tops` (log2) [T, H, COUNT]. Tile t of a
    context, TILE positions, is of part t % COUNT; BLOCK is the power of 2 that holds COUNT."""

    sums: Any
    tops: Any
    totals: Any
    V: Any
    COUNT: Any
    TILE: Any
    BLOCK: Any


class Join(NamedTuple):
    """How parts are joined: M rows, V dims of each, and AT_ONCE parts at once."""

    M: Any
    V: Any
    AT_ONCE: Any


@triton.jit
def has_tiles(part, low, high, COUNT: tl.constexpr):
    """Whether a part has any of the tiles [low, high]."""
    return (part < COUNT) & ((part - low % COUNT + COUNT) % COUNT <= high - low)


@triton.jit
def joined(
    parts,
    variant,
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
    """Dims from `first` on of rows of `out` [T, H, V], of the parts that each row sees: `token`,
    `head`, position `at` and whether a row is `mine`, all [M]. Those of `padding` [M] are 0.

    Parts are loaded some at once and added up one after the other, so that a row's sum depends on
    its own position alone.
    """
    V: tl.constexpr = parts.V
    COUNT: tl.constexpr = parts.COUNT
    dim = first + tl.arange(0, join.V)
    inside = (dim < V)[None, :]
    place = token.to(tl.int64) * HEADS + head
    index = tl.arange(0, parts.BLOCK)
    high = at // parts.TILE
    low = high * 0
    if variant.WINDOW:
        low = tl.maximum(at - variant.WINDOW + 1, 0) // parts.TILE
    seen = mine[:, None] & has_tiles(index[None, :], low[:, None], high[:, None], COUNT)
    where = place[:, None] * COUNT + index[None, :]
    top = tl.load(parts.tops + where, mask=seen, other=float("-inf"), cache_modifier=".cg")
    base = tl.max(top, 1)
    if variant.sinks is not None:
        sink = tl.load(variant.sinks + head, mask=mine, other=0.0).to(tl.float32) * LOG2E
        base = tl.maximum(base, sink)
    # A row of others has no top: its weights are 0, not NaN.
    base = tl.where(base == float("-inf"), 0.0, base)
    whole = base * 0
    acc = tl.zeros([join.M, join.V], tl.float32)
    begin = tl.min(tl.where(seen, index[None, :], COUNT), 1)
    end = tl.max(tl.where(seen, index[None, :] + 1, 0), 1)
    for some in range(tl.min(begin, 0), tl.max(end, 0), join.AT_ONCE):
        scores = ()
        weights = ()
        values = ()
        for i in tl.static_range(join.AT_ONCE):
            here = mine & has_tiles(some + i, low, high, COUNT)
            to = place * COUNT + some + i
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
    parts,
    pages,
    variant,
    join,
    out,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """Program (token, head, block of V): out [T, H, V] of the parts that the token sees; 0 for a
    token of slot -1. Blocks beyond V do nothing. AHEAD as in decode_kernel."""
    pdl_launch(PROGRAMMATIC)
    if not AHEAD:
        pdl_join(PROGRAMMATIC)
    one = tl.arange(0, 1)
    token = tl.program_id(0) + one
    head = tl.program_id(1) + one
    slot = tl.load(pages.slots + token)
    at = tl.load(pages.positions + token)
    if AHEAD:
        pdl_join(PROGRAMMATIC)
    first = tl.program_id(2) * join.V
    joined(parts, variant, join, out, token, head, at, slot >= 0, slot < 0, first, HEADS)
