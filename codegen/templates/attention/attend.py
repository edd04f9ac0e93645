"""Attention of blocks of query rows over a context, whole or in splits.

The rows of a key/value head are its (token, query head) pairs, token by token, GROUP heads each:
they share every load of keys and values. Contexts are walked in tiles that begin at multiples of
BLOCK_N, and splits begin at fixed positions, so that the order of a row's sums depends on its own
position alone and not on what else is in the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..arrival import last_to_arrive
from ..pdl import pdl_join, pdl_launch
from .heads_within import append, make_heads, places_of
from .splits import LOG2E, joined, split_start

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
def _ranks(slots, M: tl.constexpr):
    """[M] how many different slots of `slots` [M] lie below each; -1 for slot -1."""
    row = tl.arange(0, M)
    earlier = (slots[:, None] == slots[None, :]) & (row[:, None] < row[None, :])
    first = (tl.sum(earlier.to(tl.int32), 0) == 0) & (slots >= 0)
    below = first[None, :] & (slots[None, :] < slots[:, None])
    return tl.where(slots < 0, -1, tl.sum(below.to(tl.int32), 1))


@triton.jit
def _columns(base, at, seen, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[N, BLOCK] the first SIZE elements from each of `at` [N] on; 0 beyond and where not `seen`.
    The addresses of tiles are a scalar and small offsets, which cost few registers."""
    dim = tl.arange(0, BLOCK)
    mask = seen[:, None]
    if BLOCK != SIZE:
        mask = mask & (dim < SIZE)[None, :]
    return tl.load(base + at[:, None] + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _part_of_queries(query, token, head, mine):
    """[rows, BLOCK] of a Query for rows (token i64, head); 0 where not `mine`."""
    at = token * query.TOKEN + head * query.HEAD + query.SKIP
    return _columns(query.data, at, mine, query.D, query.BLOCK)


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
def _span(rank, this, slot_of, at, limit, variant, splits, part, parts_each):
    """Of the rows of rank `this`: which they are, their slot, the first and the last position that
    they see, and the first split of this part and the end of the splits that hold those."""
    mine = rank == this
    slot = tl.max(tl.where(mine, slot_of, -1), 0)
    last = tl.max(tl.where(mine, limit, -1), 0)
    first = last * 0
    if variant.WINDOW:
        oldest = tl.min(tl.where(mine, at, _FAR), 0)
        first = tl.maximum(first, oldest - variant.WINDOW + 1)
    low = first * 0
    high = first * 0 + 1
    if splits.COUNT > 1:
        index = tl.arange(0, splits.BLOCK)
        low = tl.sum((split_start(index + 1, splits) <= first).to(tl.int32), 0)
        high = tl.sum((split_start(index, splits) <= last).to(tl.int32), 0)
        low += (part - low % parts_each + parts_each) % parts_each
    return mine, slot, first, last, low, high


@triton.jit
def _prefetch(keys, values, pages, splits, kv_head, slot, first, last, low, high, N: tl.constexpr):
    """Bring the first N keys and values that split `low` has into the L2. There all see what is
    written later, so they may be written yet."""
    begin = tl.maximum(first // N * N, split_start(low, splits))
    some = (slot >= 0) & (low < high)
    at = pages.table + slot * pages.PER_SLOT + begin // pages.SIZE
    page = tl.load(at, mask=some, other=0)
    row = page.to(tl.int64) * pages.SIZE + begin % pages.SIZE
    tile = tl.arange(0, N)
    written = some & (begin + tile <= last)
    _touch(keys, kv_head, row + tile, written)
    if values is not None:
        _touch(values, kv_head, row + tile, written)


@triton.jit
def _touch(keys, kv_head, row, mine):
    """Prefetch the lines of rows `row` [N] of a head that are `mine`."""
    LINE: tl.constexpr = 128 * 8 // keys.data.dtype.element_ty.primitive_bitwidth
    line = tl.arange(0, max(keys.BLOCK // LINE, 1)) * LINE
    to = keys.data + (row * keys.ROW + kv_head * keys.HEAD)[:, None] + line[None, :]
    wanted = (mine[:, None] & (line < keys.D)[None, :]).to(tl.int32)
    asm: tl.constexpr = (
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
    )
    tl.inline_asm_elementwise(asm, "=r,l,r", [to.to(tl.int64), wanted], tl.int32, False, 1)


@triton.jit
def attend_kernel(
    query,
    query_rest,
    heads,
    keys,
    values,
    pages,
    variant,
    splits,
    out,
    parts,
    arrivals,
    join,
    tokens,
    context,
    blocks,
    lanes,
    parts_each,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """BLOCK_M rows of a key/value head over the contexts of their slots, with online softmax.

    Keys are the dims of `query` ‖ `query_rest` (which may be None) of a row of `keys`; values are
    the first dims of a row of `values`, or of the keys where that is None. With `pages` rows lie in
    pages of a multiple of BLOCK_N; without them there is one sequence of `context` rows, of which
    the tokens are the last.

    Program ((part · heads + head) · lanes + lane) · blocks + block: the lane takes every lanes-th
    slot that the block's rows are of (SLOTS at most), the part every `parts_each`-th split; those
    beyond do nothing. With one split the context is not split and `out` [T, H, V] is the result.
    Otherwise what the splits make are `parts`, for combine_kernel or, with `arrivals`
    [blocks · heads · lanes], for the last program of a block and lane, which joins them: of M rows,
    the others being no tokens'.

    With `heads` (heads_within.Heads) queries are not read but made, and so are the keys and values
    of the step's tokens: each program writes those of its part's splits into the caches before it
    reads any. All that do so write the same. AHEAD says that no launch of the step writes the index
    of `pages` before this one: it is read before the launches before have ended.
    """
    pdl_launch(PROGRAMMATIC)
    if not AHEAD:
        pdl_join(PROGRAMMATIC)
    SPLITS: tl.constexpr = splits.COUNT
    WINDOW: tl.constexpr = variant.WINDOW
    V: tl.constexpr = keys.D if values is None else values.D
    BLOCK_V: tl.constexpr = keys.BLOCK if values is None else values.BLOCK
    # The last rows have the longest contexts: they begin first.
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    groups = blocks * (HEADS // GROUP) * lanes
    group = program % groups
    part = program // groups
    kv_head = group // blocks // lanes
    lane = group // blocks % lanes

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = (token < tokens) & (part < parts_each)
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
        rank = _ranks(slot_of, BLOCK_M)
    if heads is not None:
        places = places_of(pages, splits, tokens, part, parts_each, heads.BLOCK)
    if SLOTS == 1 or AHEAD:
        nearest = _span(rank, lane, slot_of, at, limit, variant, splits, part, parts_each)
    if AHEAD:
        if PROGRAMMATIC:
            _, slot_0, first_0, last_0, low_0, high_0 = nearest
            _prefetch(
                keys,
                values,
                pages,
                splits,
                kv_head,
                slot_0,
                first_0,
                last_0,
                low_0,
                high_0,
                BLOCK_N,
            )
        pdl_join(PROGRAMMATIC)
    if heads is not None:
        dtype: tl.constexpr = keys.data.dtype.element_ty
        q, new_k, new_v = make_heads(heads, token, head, slot_of >= 0, kv_head, places, dtype)
        append(new_k, new_v, keys, values, kv_head, places, heads.BY_WAVE)
    place = (token.to(tl.int64) * HEADS + head) * SPLITS
    dim_v = tl.arange(0, BLOCK_V)
    inside_v = (dim_v < V)[None, :]

    if SPLITS == 1:
        zeros = tl.zeros([BLOCK_M, BLOCK_V], out.dtype.element_ty)
        padding = (real & (slot_of < 0) & (lane == 0))[:, None] & inside_v
        tl.store(out + place[:, None] * V + dim_v[None, :], zeros, mask=padding)

    for this in range(lane, tl.max(rank, 0) + 1, lanes):
        # The splits [low, high) hold what the rows see; every `parts_each`-th is this part's.
        if SLOTS == 1:
            mine, slot, first, last, low, high = nearest
        else:
            mine, slot, first, last, low, high = _span(
                rank, this, slot_of, at, limit, variant, splits, part, parts_each
            )
        token_at = token.to(tl.int64)
        if heads is None:
            q = _part_of_queries(query, token_at, head, mine)
        if query_rest is not None:
            q_rest = _part_of_queries(query_rest, token_at, head, mine)

        # Of a whole context there is one: no loop, whose bounds would cost the tiles registers.
        WHOLE: tl.constexpr = SPLITS == 1
        for split in range(0 if WHOLE else low, 1 if WHOLE else high, 1 if WHOLE else parts_each):
            begin = first // BLOCK_N * BLOCK_N
            end = last + 1
            if SPLITS > 1:
                begin = tl.maximum(begin, split_start(part * 0 + split, splits))
                end = tl.minimum(end, split_start(part * 0 + split + 1, splits))
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for start in range(begin, end, BLOCK_N):
                n = begin * 0 + start
                tile = tl.arange(0, BLOCK_N)
                where = n + tile
                # What lies outside was perhaps never written: it may be NaN, and 0 · NaN is NaN.
                written = (where >= first) & (where <= last)
                row_n = n.to(tl.int64)
                if pages is not None:
                    page = tl.load(pages.table + slot * pages.PER_SLOT + n // pages.SIZE)
                    row_n = page.to(tl.int64) * pages.SIZE + n % pages.SIZE
                key = keys.data + (row_n * keys.ROW + kv_head * keys.HEAD)
                k = _columns(key, tile * keys.ROW, written, keys.D, keys.BLOCK)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee")
                if query_rest is not None:
                    k_rest = _columns(
                        key + keys.D, tile * keys.ROW, written, query_rest.D, query_rest.BLOCK
                    )
                    scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
                scores = _softcapped(scores, variant.SCALE, variant.SOFTCAP)
                # What rows of other slots see here is stored nowhere.
                seen = where[None, :] <= limit[:, None]
                if WINDOW:
                    seen = seen & (where[None, :] > at[:, None] - WINDOW)
                scores = tl.where(seen, scores, float("-inf"))

                higher = tl.maximum(top, tl.max(scores, 1))
                # A row that has seen nothing yet has no top: its weights are 0, not NaN.
                base = tl.where(higher == float("-inf"), 0.0, higher)
                weights = tl.exp2(scores - base[:, None])
                fade = tl.exp2(top - base)
                top = higher
                total = total * fade + tl.sum(weights, 1)
                if values is None:
                    v = k
                else:
                    value = values.data + (row_n * values.ROW + kv_head * values.HEAD)
                    v = _columns(value, tile * values.ROW, written, V, BLOCK_V)
                acc = acc * fade[:, None]
                acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

            stored = mine[:, None] & inside_v
            if SPLITS == 1:
                if variant.sinks is not None:
                    sink = (
                        tl.load(variant.sinks + head, mask=mine, other=0.0).to(tl.float32) * LOG2E
                    )
                    base = tl.maximum(top, sink)
                    fade = tl.exp2(top - base)
                    total = total * fade + tl.exp2(sink - base)
                    acc = acc * fade[:, None]
                acc = acc / total[:, None]
                result = acc.to(out.dtype.element_ty)
                tl.store(out + place[:, None] * V + dim_v[None, :], result, mask=stored)
            else:
                to = place + split
                tl.store(parts.tops + to, top, mask=mine)
                tl.store(parts.totals + to, total, mask=mine)
                tl.store(parts.sums + to[:, None] * V + dim_v[None, :], acc, mask=stored)

    if arrivals is not None:
        joins = part < parts_each
        if joins:
            joins = last_to_arrive(arrivals, group, parts_each)
        if joins:
            _join_rows(
                parts,
                pages,
                variant,
                splits,
                join,
                out,
                block * BLOCK_M,
                kv_head,
                lane,
                lanes,
                tokens,
                HEADS,
                GROUP,
                SLOTS,
            )


@triton.jit
def _join_rows(
    parts,
    pages,
    variant,
    splits,
    join,
    out,
    first,
    kv_head,
    lane,
    lanes,
    tokens,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Rows from `first` on of a lane, of the splits that all its programs have made; those of
    tokens of slot -1 are 0, in the first lane."""
    row = first + tl.arange(0, join.M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = token < tokens
    slot = tl.load(pages.slots + token, mask=real, other=-1)
    at = tl.load(pages.positions + token, mask=token < tokens, other=0)
    rank = tl.where(slot < 0, -1, 0)
    if SLOTS > 1:
        rank = _ranks(slot, join.M)
    mine = (rank >= 0) & (rank % lanes == lane)
    V: tl.constexpr = parts.V
    padding = real & (slot < 0) & (lane == 0)
    for v in tl.static_range(0, V, join.V):
        joined(parts, variant, splits, join, out, token, head, at, mine, padding, v, HEADS)
