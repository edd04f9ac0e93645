"""Attention of blocks of query rows over their contexts, each of which is walked whole.

The rows of a key/value head are its (token, query head) pairs, token by token, GROUP heads each:
they share every load of keys and values. Contexts are walked in tiles that begin at multiples of
BLOCK_N, so that the order of a row's sums depends on its own position alone and not on what else is
in the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..pdl import pdl_wait

LOG2E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(2**31 - 1)


class Query(NamedTuple):
    """Part of the queries: D dims (padded to BLOCK) from SKIP on, with strides of tokens and heads
    in elements."""

    data: Any
    TOKEN: Any
    HEAD: Any
    SKIP: Any
    D: Any
    BLOCK: Any


class Keys(NamedTuple):
    """Keys or values of D dims (padded to BLOCK), with strides of rows and heads in elements."""

    data: Any
    ROW: Any
    HEAD: Any
    D: Any
    BLOCK: Any


class Variant(NamedTuple):
    """What one attention has that another has not: the scale, a WINDOW of positions and a SOFTCAP
    of scores (0: none), whether it is CAUSAL, and `sinks` [H], logits of nothing (or None)."""

    SCALE: Any
    WINDOW: Any
    SOFTCAP: Any
    CAUSAL: Any
    sinks: Any


@triton.jit
def ranks_of(slots, M: tl.constexpr):
    """[M] how many different slots of `slots` [M] lie below each; -1 for slot -1."""
    row = tl.arange(0, M)
    earlier = (slots[:, None] == slots[None, :]) & (row[:, None] < row[None, :])
    first = (tl.sum(earlier.to(tl.int32), 0) == 0) & (slots >= 0)
    below = first[None, :] & (slots[None, :] < slots[:, None])
    return tl.where(slots < 0, -1, tl.sum(below.to(tl.int32), 1))


@triton.jit
def spanned(rank, this, slot_of, at, limit, variant):
    """Of the rows of rank `this`: which they are, their slot, and the first and the last position
    that they see."""
    mine = rank == this
    slot = tl.max(tl.where(mine, slot_of, -1), 0)
    last = tl.max(tl.where(mine, limit, -1), 0)
    first = last * 0
    if variant.WINDOW:
        oldest = tl.min(tl.where(mine, at, _FAR), 0)
        first = tl.maximum(first, oldest - variant.WINDOW + 1)
    return mine, slot, first, last


@triton.jit
def columns(base, at, seen, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[..., BLOCK] the first SIZE elements from each of `at` [...] on; 0 beyond and where not
    `seen`. The addresses of tiles are a scalar and small offsets, which cost few registers."""
    dim = tl.arange(0, BLOCK)
    mask = tl.expand_dims(seen, -1)
    if BLOCK != SIZE:
        mask = mask & (dim < SIZE)
    return tl.load(base + (tl.expand_dims(at, -1) + dim), mask=mask, other=0.0)


@triton.jit
def queries_of(query, token, head, mine):
    """[rows, BLOCK] of a Query for rows (token i64, head); 0 where not `mine`."""
    at = token * query.TOKEN + head * query.HEAD + query.SKIP
    return columns(query.data, at, mine, query.D, query.BLOCK)


@triton.jit
def turned_queries_of(query, rotation, token, head, mine):
    """queries_of, rotated by a Rotation of all D dims, or of none."""
    if rotation.HALF == 0:
        q = queries_of(query, token, head, mine)
    else:
        HALF: tl.constexpr = rotation.HALF
        d = tl.arange(0, query.BLOCK)
        if rotation.FORM == "interleaved":
            pair = d // 2
            second = d % 2
        else:
            pair = d % HALF
            second = d // HALF
        if rotation.FORM == "half":
            own = d
            other = pair + (1 - second) * HALF
        else:
            own = 2 * pair + second
            other = 2 * pair + 1 - second
        inside = mine[:, None] & (d < 2 * HALF)[None, :]
        base = query.data + (token * query.TOKEN + head * query.HEAD + query.SKIP)[:, None]
        x = tl.load(base + own[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(base + other[None, :], mask=inside, other=0.0).to(tl.float32)
        table = (token * rotation.STEP)[:, None] + pair[None, :]
        c = tl.load(rotation.cos + table, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(rotation.sin + table, mask=inside, other=0.0).to(tl.float32)
        turned = x * c + tl.where(second == 1, 1.0, -1.0)[None, :] * y * s
        q = turned.to(query.data.dtype.element_ty)
    return q


@triton.jit
def row_of(pages, slot, n):
    """The row of a cache (i64) that position n of a slot has; n itself without `pages`."""
    row = n.to(tl.int64)
    if pages is not None:
        page = tl.load(pages.table + slot * pages.PER_SLOT + n // pages.SIZE)
        row = page.to(tl.int64) * pages.SIZE + n % pages.SIZE
    return row


@triton.jit
def _softcapped(scores, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores in units of log2, scaled and bounded."""
    if SOFTCAP > 0:
        x = scores * (SCALE / SOFTCAP)
        scores = (1 - 2 / (tl.exp(2 * x) + 1)) * (SOFTCAP * LOG2E)
    else:
        scores = scores * (SCALE * LOG2E)
    return scores


@triton.jit
def _turned(k, EACH: tl.constexpr):
    """Keys as the right operand of a product."""
    if EACH:
        k = tl.permute(k, (0, 2, 1))
    else:
        k = tl.trans(k)
    return k


@triton.jit
def attend_tile(
    q,
    q_rest,
    rest,
    keys,
    values,
    pages,
    variant,
    kv_head,
    slot,
    n,
    tile,
    first,
    last,
    at,
    limit,
    top,
    total,
    acc,
    EACH: tl.constexpr,
):
    """Online softmax over a tile of a context: its greatest scores `top` (log2) and the `total` of
    weights [..., M], and the weighted values `acc` [..., M, V] with those of this tile.

    `q` and `q_rest` (a Query `rest`; None) are [..., M, D], the rows being at positions `at` [M]
    and seeing up to `limit`. Position n of the context, in `row` of the caches, is the first of
    the tile, `tile` [..., N] what its positions are beyond n, and the rows see [first, last].
    With EACH there is one more dim, of parts of the tile that have sums of their own.
    """
    where = n + tile
    # What lies outside was perhaps never written: it may be NaN, and 0 · NaN is NaN.
    written = (where >= first) & (where <= last)
    row = row_of(pages, slot, n)
    key = keys.data + (row * keys.ROW + kv_head * keys.HEAD)
    k = columns(key, tile * keys.ROW, written, keys.D, keys.BLOCK)
    scores = tl.dot(q, _turned(k, EACH), input_precision="ieee")
    if rest is not None:
        k_rest = columns(key + keys.D, tile * keys.ROW, written, rest.D, rest.BLOCK)
        scores = tl.dot(q_rest, _turned(k_rest, EACH), scores, input_precision="ieee")
    scores = _softcapped(scores, variant.SCALE, variant.SOFTCAP)
    # What rows of other slots see here is stored nowhere.
    across = tl.expand_dims(where, -2)
    seen = across <= limit[:, None]
    if variant.WINDOW:
        seen = seen & (across > at[:, None] - variant.WINDOW)
    scores = tl.where(seen, scores, float("-inf"))

    higher = tl.maximum(top, tl.max(scores, -1))
    # A row that has seen nothing yet has no top: its weights are 0, not NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - tl.expand_dims(base, -1))
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, -1)
    if values is None:
        v = k
    else:
        value = values.data + (row * values.ROW + kv_head * values.HEAD)
        v = columns(value, tile * values.ROW, written, values.D, values.BLOCK)
    acc = tl.dot(weights.to(v.dtype), v, acc * tl.expand_dims(fade, -1), input_precision="ieee")
    return higher, total, acc


@triton.jit
def finished(variant, head, mine, top, total, acc):
    """[M, V] the values of rows that have seen all of their contexts; with their sinks."""
    if variant.sinks is not None:
        sink = tl.load(variant.sinks + head, mask=mine, other=0.0).to(tl.float32) * LOG2E
        base = tl.maximum(top, sink)
        fade = tl.exp2(top - base)
        total = total * fade + tl.exp2(sink - base)
        acc = acc * fade[:, None]
    return acc / total[:, None]


@triton.jit
def attend_kernel(
    query,
    query_rest,
    rotation,
    keys,
    values,
    pages,
    variant,
    out,
    tokens,
    context,
    lanes,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """BLOCK_M rows of a key/value head over the contexts of their slots: `out` [T, H, V].

    Keys are the dims of `query` ‖ `query_rest` (which may be None, and is turned first by
    `rotation`) of a row of `keys`; values are the first dims of a row of `values`, or of the keys
    where that is None. With `pages` rows lie in pages of a multiple of BLOCK_N; without them there
    is one sequence of `context` rows, of which the tokens are the last. Program (block, head,
    lane): the lane takes every lanes-th slot that the block's rows are of (SLOTS at most).
    """
    pdl_wait(PROGRAMMATIC)
    V: tl.constexpr = keys.D if values is None else values.D
    BLOCK_V: tl.constexpr = keys.BLOCK if values is None else values.BLOCK
    # The last rows have the longest contexts: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    lane = tl.program_id(2)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = token < tokens
    if pages is not None:
        slot_of = tl.load(pages.slots + token, mask=real, other=-1)
        at = tl.load(pages.positions + token, mask=real, other=0)
    else:
        slot_of = tl.where(real, 0, -1)
        at = token + (context - tokens)
    limit = at
    if not variant.CAUSAL:
        limit = at * 0 + (context - 1)
    rank = tl.where(slot_of < 0, -1, 0)
    if SLOTS > 1:
        rank = ranks_of(slot_of, BLOCK_M)
    place = token.to(tl.int64) * HEADS + head
    dim_v = tl.arange(0, BLOCK_V)
    inside_v = (dim_v < V)[None, :]
    to = out + place[:, None] * V + dim_v[None, :]
    zeros = tl.zeros([BLOCK_M, BLOCK_V], out.dtype.element_ty)
    tl.store(to, zeros, mask=(real & (slot_of < 0) & (lane == 0))[:, None] & inside_v)

    for this in range(lane, tl.max(rank, 0) + 1, lanes):
        mine, slot, first, last = spanned(rank, this, slot_of, at, limit, variant)
        q = queries_of(query, token.to(tl.int64), head, mine)
        q_rest = q
        if query_rest is not None:
            q_rest = turned_queries_of(query_rest, rotation, token.to(tl.int64), head, mine)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for start in range(first // BLOCK_N * BLOCK_N, last + 1, BLOCK_N):
            n = first * 0 + start
            top, total, acc = attend_tile(
                q,
                q_rest,
                query_rest,
                keys,
                values,
                pages,
                variant,
                kv_head,
                slot,
                n,
                tl.arange(0, BLOCK_N),
                first,
                last,
                at,
                limit,
                top,
                total,
                acc,
                False,
            )
        result = finished(variant, head, mine, top, total, acc)
        tl.store(to, result.to(out.dtype.element_ty), mask=mine[:, None] & inside_v)
