"""Kernels of a mixture's gate: the router's GEMM over normed rows, and the choice.

However many tokens there are, K is summed in chunks of CHUNK columns, BLOCK at a time, and chunks
in order: in one program or, where tokens are few, each in one of its own (split-K). Of those the
last to arrive may choose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..arrival import last_to_arrive
from ..pdl import pdl_join, pdl_launch, pdl_wait
from ..rowwise.row_norm import normed, scales_of_row, store_row, summed
from .choose import choose, experts_in_lanes


class Router(NamedTuple):
    """The router's weight, dense [COUNT, WIDTH], and how products with it are summed: in DOT."""

    weight: Any
    WIDTH: Any
    COUNT: Any
    CHUNK: Any
    BLOCK: Any
    DOT: Any


@triton.jit
def _weight(router, expert, present, start):
    """[EXPERTS, BLOCK] of the experts' rows, from column `start` on; 0 outside."""
    at = start + tl.arange(0, router.BLOCK)
    mask = present[:, None] & (at < router.WIDTH)[None, :]
    return tl.load(router.weight + expert[:, None] * router.WIDTH + at[None, :], mask=mask, other=0)


@triton.jit
def _add_products(total, w, rows, token, post_scale, scale, n, s, router, start):
    """`total` and the products of a token with `w`, the experts' rows from column `start` on;
    stores n and s there, if they are given.

    The token is one column of sixteen, which is what a matrix instruction takes.
    """
    K: tl.constexpr = router.WIDTH
    at = start + tl.arange(0, router.BLOCK)
    inside = at < K
    added = summed(rows, token, post_scale, at, inside)
    if s is not None:
        tl.store(s + token * K + at, added.to(s.dtype.element_ty), mask=inside)
    value = normed(rows, added, scale, at, inside)
    if n is not None:
        tl.store(n + token * K + at, value, mask=inside)
    first = tl.arange(0, 16)[None, :] == 0
    tile = tl.where(first, value.to(tl.float32)[:, None], 0.0).to(router.DOT)
    return tl.dot(w.to(router.DOT), tile, total, input_precision="ieee")


@triton.jit
def _of_token(total):
    """f32 [EXPERTS]: the column of `total` [EXPERTS, 16] that is the token's."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, total, 0.0), 1)


@triton.jit
def gate_kernel(rows, router, choice, n, s, ROW_BLOCK: tl.constexpr, PROGRAMMATIC: tl.constexpr):
    """The whole gate of one token."""
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    post_scale, scale = scales_of_row(rows, token, router.WIDTH, ROW_BLOCK)
    LANES: tl.constexpr = choice.GROUPS2 * choice.SIZE2
    expert, present = experts_in_lanes(choice)
    total = tl.zeros([LANES], tl.float32)
    for first in range(0, router.WIDTH, router.CHUNK):
        part = tl.zeros([LANES, 16], tl.float32)
        for start in range(first, first + router.CHUNK, router.BLOCK):
            w = _weight(router, expert, present, start)
            part = _add_products(part, w, rows, token, post_scale, scale, n, s, router, start)
        total += _of_token(part)
    choose(total, choice, token)


@triton.jit
def _choose_by_parts(logits, choice, token, tokens, STEP: tl.constexpr, PARTS: tl.constexpr):
    """The choice of one token (i64), by logits that lie in PARTS parts [PARTS, tokens, E] to be
    summed in order; rows are STEP apart."""
    expert, present = experts_in_lanes(choice)
    total = tl.zeros([choice.GROUPS2 * choice.SIZE2], tl.float32)
    for part in tl.static_range(PARTS):
        row = logits + (token + part * tokens) * STEP
        held = tl.load(row + expert, mask=present, other=0, cache_modifier=".cg")
        total += held.to(tl.float32)
    choose(total, choice, token)


@triton.jit
def token_partials_kernel(
    rows,
    router,
    n,
    s,
    partials,
    choice,
    arrivals,
    tokens,
    PARTS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """partials f32 [PARTS, tokens, COUNT]: one token, sixteen experts, one chunk of the columns.

    Program (part · sixteens + sixteen) · tokens + token; those beyond do nothing. A router that is
    a constant (AHEAD) is read before the launches before have ended. Every program takes the norm
    of its token for itself; those of the first experts store n and s. With `arrivals` [tokens] the
    last of a token makes its choice.
    """
    if AHEAD:
        pdl_launch(PROGRAMMATIC)
    else:
        pdl_wait(PROGRAMMATIC)
    COUNT: tl.constexpr = router.COUNT
    BLOCK: tl.constexpr = router.BLOCK
    BLOCKS: tl.constexpr = router.CHUNK // BLOCK
    SIXTEENS: tl.constexpr = (COUNT + 15) // 16
    token = (tl.program_id(0) % tokens).to(tl.int64)
    sixteen = tl.program_id(0) // tokens % SIXTEENS
    part = tl.program_id(0) // tokens // SIXTEENS
    first = part * router.CHUNK
    expert = sixteen * 16 + tl.arange(0, 16)
    present = (expert < COUNT) & (part < PARTS)
    weights = ()
    for i in tl.static_range(BLOCKS):
        weights = weights + (_weight(router, expert, present, first + i * BLOCK),)
    if AHEAD:
        pdl_join(PROGRAMMATIC)
    if part < PARTS:
        post_scale, scale = scales_of_row(rows, token, router.WIDTH, ROW_BLOCK)
        total = tl.zeros([16, 16], tl.float32)
        for i in tl.static_range(BLOCKS):
            start = first + i * BLOCK
            total = _add_products(
                total, weights[i], rows, token, post_scale, scale, None, None, router, start
            )
        at = (part.to(tl.int64) * tokens + token) * COUNT + expert
        tl.store(partials + at, _of_token(total), mask=present)
        if sixteen == 0:
            stop = first + router.CHUNK
            store_row(rows, token, post_scale, scale, n, s, first, stop, router.WIDTH, BLOCK)
        if arrivals is not None:
            last = last_to_arrive(arrivals, token, PARTS * SIXTEENS)
            if last:
                _choose_by_parts(partials, choice, token, tokens, COUNT, PARTS)


@triton.jit
def tile_logits_kernel(
    x,
    router,
    logits,
    tokens,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """logits f32 [tokens, COUNT], not yet rounded: TOKENS tokens by sixteen experts."""
    pdl_wait(PROGRAMMATIC)
    WIDTH: tl.constexpr = router.WIDTH
    COUNT: tl.constexpr = router.COUNT
    BLOCK: tl.constexpr = router.BLOCK
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    row = x + token.to(tl.int64) * STEP
    expert = tl.program_id(1) * 16 + tl.arange(0, 16)
    present = expert < COUNT
    total = tl.zeros([16, TOKENS], tl.float32)
    for first in range(0, WIDTH, router.CHUNK):
        part = tl.zeros([16, TOKENS], tl.float32)
        for start in range(first, first + router.CHUNK, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < WIDTH
            mask = inside[:, None] & live[None, :]
            value = tl.load(row[None, :] + at[:, None], mask=mask, other=0).to(router.DOT)
            mask = present[:, None] & inside[None, :]
            w = tl.load(router.weight + expert[:, None] * WIDTH + at[None, :], mask=mask, other=0)
            part = tl.dot(w.to(router.DOT), value, part, input_precision="ieee")
        total += part
    at = logits + token[None, :].to(tl.int64) * COUNT + expert[:, None]
    tl.store(at, total, mask=present[:, None] & live[None, :])


@triton.jit
def choose_kernel(
    logits, choice, tokens, STEP: tl.constexpr, PARTS: tl.constexpr, PROGRAMMATIC: tl.constexpr
):
    """A program a token: see _choose_by_parts."""
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    _choose_by_parts(logits, choice, token, tokens, STEP, PARTS)
