"""Heads that attention makes itself, and appends to its caches before it attends."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .heads import finish_heads, read_heads


class Heads(NamedTuple):
    """HeadParts of queries, keys and values, for attention that makes them itself: a block of BLOCK
    rows holds all tokens of a step. BY_WAVE as in arrival.Arrivals."""

    product: Any
    query: Any
    key: Any
    value: Any
    rotation: Any
    BLOCK: Any
    BY_WAVE: Any


@triton.jit
def places_of(pages, tokens, part, COUNT: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] the rows of a cache (i64) that the first of `tokens` tokens have, -1 for those whose
    tiles of N positions are not of this `part` and for padding."""
    token = tl.arange(0, BLOCK)
    slot = tl.load(pages.slots + token, mask=token < tokens, other=-1)
    at = tl.load(pages.positions + token, mask=token < tokens, other=0)
    here = (slot >= 0) & (at // N % COUNT == part)
    page = tl.load(pages.table + slot * pages.PER_SLOT + at // pages.SIZE, mask=here, other=0)
    return tl.where(here, page.to(tl.int64) * pages.SIZE + at % pages.SIZE, -1)


@triton.jit
def make_heads(heads, token, head, mine, kv_head, to, dtype: tl.constexpr):
    """The queries of rows (token, head) that are `mine`, and the keys and values of a head for the
    tokens that have a row `to` [BLOCK]. All is read before anything is waited for."""
    of = tl.where(mine, token, 0).to(tl.int64)[:, None]
    new = to >= 0
    row = tl.arange(0, heads.BLOCK)
    each = tl.where(new, row, 0).to(tl.int64)[:, None]
    same = row * 0 + kv_head
    q = read_heads(heads.product, heads.query, heads.rotation, of, head, mine)
    k = read_heads(heads.product, heads.key, heads.rotation, each, same, new)
    v = read_heads(heads.product, heads.value, heads.rotation, each, same, new)
    k = finish_heads(heads.product, heads.key, heads.rotation, k, None).to(dtype)
    v = finish_heads(heads.product, heads.value, heads.rotation, v, None).to(dtype)
    q = finish_heads(heads.product, heads.query, heads.rotation, q, None).to(dtype)
    return q, k, v


@triton.jit
def append(k, v, keys, values, kv_head, to, BY_WAVE: tl.constexpr):
    """Write keys and values of a head into rows `to` of their caches, but for -1. All that this
    program loads behind it sees them."""
    new = (to >= 0)[:, None]
    at = to[:, None]
    d = tl.arange(0, keys.BLOCK)[None, :]
    key = keys.data + at * keys.ROW + kv_head * keys.HEAD + d
    tl.store(key, k, mask=new & (d < keys.D))
    d = tl.arange(0, values.BLOCK)[None, :]
    value = values.data + at * values.ROW + kv_head * values.HEAD + d
    tl.store(value, v, mask=new & (d < values.D))
    stored(BY_WAVE)


@triton.jit
def stored(BY_WAVE: tl.constexpr):
    """Wait until all threads of this program see what any of them has stored."""
    if BY_WAVE:
        asm: tl.constexpr = "s_waitcnt vmcnt(0)\nv_mov_b32 $0, 0"
        tl.inline_asm_elementwise(asm, "=v,~{memory}", [], tl.int32, False, 1)
    tl.debug_barrier()
