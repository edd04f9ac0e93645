"""Attention of few query rows: contexts in parts, which several programs walk beside each other.

Tile t of a context, BLOCK_N positions, is of part t % COUNT. A part adds up its tiles one after the
other, and parts are joined in their order: so a row's sums depend on its own position and on COUNT,
which an entry has, and not on what else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arrival import last_to_arrive
from ..pdl import pdl_join, pdl_launch
from .attend import attend_tile, finished, queries_of, ranks_of, spanned, turned_queries_of
from .heads_within import append, make_heads, places_of
from .latent_rows import append_latent_rows
from .parts import joined


@triton.jit
def first_tile(part, first, COUNT: tl.constexpr, N: tl.constexpr):
    """The first tile of a part that has positions from `first` on."""
    tile = first // N
    return tile + (part - tile % COUNT + COUNT) % COUNT


@triton.jit
def _prefetch(keys, values, pages, kv_head, slot, tile, first, last, N: tl.constexpr):
    """Bring keys and values of a tile into the L2. There all see what is written later, so they may
    be written yet."""
    begin = tile * N
    some = (slot >= 0) & (begin <= last)
    at = pages.table + slot * pages.PER_SLOT + begin // pages.SIZE
    page = tl.load(at, mask=some, other=0)
    row = page.to(tl.int64) * pages.SIZE + begin % pages.SIZE
    where = tl.arange(0, N)
    written = some & (begin + where <= last) & (begin + where >= first)
    _touch(keys, kv_head, row + where, written)
    if values is not None:
        _touch(values, kv_head, row + where, written)


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
def decode_kernel(
    query,
    query_rest,
    rotation,
    heads,
    latent,
    keys,
    values,
    pages,
    variant,
    out,
    parts,
    arrivals,
    join,
    tokens,
    blocks,
    lanes,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    MAKES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WALKS: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """BLOCK_M rows of a key/value head over parts of the contexts of their slots.

    Operands are those of attend_kernel, in pages. Program ((part · heads + head) · lanes + lane) ·
    blocks + block: the lane takes every lanes-th slot that the block's rows are of (SLOTS at most);
    programs beyond do nothing. What they make are `parts`, for combine_kernel or, with `arrivals`
    [blocks · heads · lanes], for the last program of a block and lane, which joins them into `out`
    [T, H, V]: of M rows, the others being no tokens'. A single part is `out` at once.

    A tile is walked by WALKS warps by themselves, each having its positions and sums, which are
    added up at the end; with one all warps walk together.

    Where it MAKES "heads" (heads_within.Heads) queries are not read but made, and so are the keys
    and values of the step's tokens: each program writes those of its part into the caches before it
    reads any. All that do so write the same. "latent" (latent_rows.LatentWithin) are rows of the
    cache that are made likewise. AHEAD says that no launch of the step writes the index of `pages`
    before this one: it is read before the launches before have ended.
    """
    pdl_launch(PROGRAMMATIC)
    if not AHEAD:
        pdl_join(PROGRAMMATIC)
    COUNT: tl.constexpr = parts.COUNT
    N: tl.constexpr = parts.TILE
    V: tl.constexpr = keys.D if values is None else values.D
    BLOCK_V: tl.constexpr = keys.BLOCK if values is None else values.BLOCK
    # The last rows have the longest contexts: they begin first.
    program = tl.program_id(0)
    groups = blocks * (HEADS // GROUP) * lanes
    group = program % groups
    block = blocks - 1 - group % blocks
    lane = group // blocks % lanes
    kv_head = group // blocks // lanes
    part = program // groups

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = (token < tokens) & (part < COUNT)
    slot_of = tl.load(pages.slots + token, mask=real, other=-1)
    at = tl.load(pages.positions + token, mask=real, other=0)
    rank = tl.where(slot_of < 0, -1, 0)
    if SLOTS > 1:
        rank = ranks_of(slot_of, BLOCK_M)
    if MAKES == "heads":
        places = places_of(pages, tokens, part, COUNT, N, heads.BLOCK)
    if MAKES == "latent":
        places = places_of(pages, tokens, part, COUNT, N, latent.BLOCK)
    if SLOTS == 1 or AHEAD:
        mine, slot, first, last = spanned(rank, lane, slot_of, at, at, variant)
        begin = first_tile(part, first, COUNT, N)
    if AHEAD:
        if PROGRAMMATIC:
            _prefetch(keys, values, pages, kv_head, slot, begin, first, last, N)
        pdl_join(PROGRAMMATIC)
    if MAKES == "heads":
        dtype: tl.constexpr = keys.data.dtype.element_ty
        q, new_k, new_v = make_heads(heads, token, head, slot_of >= 0, kv_head, places, dtype)
        append(new_k, new_v, keys, values, kv_head, places, heads.BY_WAVE)
    if MAKES == "latent":
        append_latent_rows(latent, keys, tokens, places)
    EACH: tl.constexpr = WALKS > 1
    tile = tl.arange(0, N)
    if EACH:
        tile = tl.reshape(tile, [WALKS, N // WALKS])
    dim_v = tl.arange(0, BLOCK_V)
    inside_v = (dim_v < V)[None, :]

    # One slot needs no loop, out of which addresses would be moved and take registers.
    ONE: tl.constexpr = SLOTS == 1
    most = tl.max(rank, 0) + 1
    for this in range(0 if ONE else lane, 1 if ONE else most, 1 if ONE else lanes):
        if SLOTS > 1:
            mine, slot, first, last = spanned(rank, this, slot_of, at, at, variant)
            begin = first_tile(part, first, COUNT, N)
        if MAKES != "heads":
            q = queries_of(query, token.to(tl.int64), head, mine)
        q_rest = q
        if query_rest is not None:
            q_rest = turned_queries_of(query_rest, rotation, token.to(tl.int64), head, mine)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        q_each = q
        rest_each = q_rest
        if EACH:
            q_each = tl.broadcast_to(q[None, :, :], [WALKS, BLOCK_M, query.BLOCK])
            if query_rest is not None:
                rest_each = tl.broadcast_to(q_rest[None, :, :], [WALKS, BLOCK_M, query_rest.BLOCK])
            top = tl.full([WALKS, BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([WALKS, BLOCK_M], tl.float32)
            acc = tl.zeros([WALKS, BLOCK_M, BLOCK_V], tl.float32)
        end = (last + N) // N
        for which in range(begin, end, COUNT):
            n = (first * 0 + which) * N
            top, total, acc = attend_tile(
                q_each,
                rest_each,
                query_rest,
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
                at,
                top,
                total,
                acc,
                EACH,
            )
        if EACH:
            each = top
            top = tl.max(each, 0)
            fade = tl.exp2(each - tl.where(top == float("-inf"), 0.0, top)[None, :])
            total = tl.sum(total * fade, 0)
            acc = tl.sum(acc * fade[:, :, None], 0)
        place = (token.to(tl.int64) * HEADS + head) * COUNT + part
        to = place[:, None] * V + dim_v[None, :]
        if COUNT == 1:
            result = finished(variant, head, mine, top, total, acc).to(out.dtype.element_ty)
            tl.store(out + to, result, mask=mine[:, None] & inside_v)
        else:
            # A part without a tile of these rows stores nothing: no row asks for it.
            stored = mine & (begin < end)
            tl.store(parts.tops + place, top, mask=stored)
            tl.store(parts.totals + place, total, mask=stored)
            tl.store(parts.sums + to, acc, mask=stored[:, None] & inside_v)

    if COUNT == 1:
        to = (token.to(tl.int64) * HEADS + head)[:, None] * V + dim_v[None, :]
        padding = (real & (slot_of < 0) & (lane == 0))[:, None] & inside_v
        tl.store(out + to, tl.zeros([BLOCK_M, BLOCK_V], out.dtype.element_ty), mask=padding)

    if arrivals is not None:
        joins = part < COUNT
        if joins:
            joins = last_to_arrive(arrivals, group, COUNT)
        if joins:
            _join_rows(
                parts,
                pages,
                variant,
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
    """Rows from `first` on of a lane, of the parts that its programs have made; those of tokens of
    slot -1 are 0, in the first lane."""
    row = first + tl.arange(0, join.M)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = token < tokens
    slot = tl.load(pages.slots + token, mask=real, other=-1)
    at = tl.load(pages.positions + token, mask=real, other=0)
    rank = tl.where(slot < 0, -1, 0)
    if SLOTS > 1:
        rank = ranks_of(slot, join.M)
    mine = (rank >= 0) & (rank % lanes == lane)
    V: tl.constexpr = parts.V
    padding = real & (slot < 0) & (lane == 0)
    for v in tl.static_range(0, V, join.V):
        joined(parts, variant, join, out, token, head, at, mine, padding, v, HEADS)
