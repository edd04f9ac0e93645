"""Kernels of a mixture's gate: the router's GEMM over normed rows, and the choice.

However many tokens there are, blocks of BLOCK columns are multiplied each by itself, the sums of a
chunk of CHUNK columns added in order, and those of chunks in order: all in one program or, where
tokens are few, each chunk in one of its own (split-K). Of those the last to arrive may choose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..arrival import last_to_arrive
from ..pdl import pdl_join, pdl_launch, pdl_wait
from ..rowwise.row_norm import (
    added,
    gain_of,
    loaded,
    normed,
    post_gains,
    row_in_blocks,
    scales_of_blocks,
    scales_of_row,
    summed,
)
from .choose import choose, experts_in_lanes, offsets

# Blocks of a row that are held in registers, at most.
_HELD = tl.constexpr(8)


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


# Triton makes `total + dot(a, b)` one chain of sums that begins with `total`, unless this argument
# of the product, which is for operands of eight bits, is set.
_BY_ITSELF = tl.constexpr(1 << 30)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=_BY_ITSELF)


@triton.jit
def _add_products(total, w, rows, token, post_scale, scale, n, s, router, start):
    """`total` and the products of a token with `w`, the experts' rows from column `start` on;
    stores n and s there, if they are given.

    The token is one column of sixteen, which is what a matrix instruction takes.
    """
    K: tl.constexpr = router.WIDTH
    at = start + tl.arange(0, router.BLOCK)
    inside = at < K
    row = summed(rows, token, post_scale, at, inside)
    if s is not None:
        tl.store(s + token * K + at, row.to(s.dtype.element_ty), mask=inside)
    value = normed(rows, row, scale, at, inside)
    if n is not None:
        tl.store(n + token * K + at, value, mask=inside)
    first = tl.arange(0, 16)[None, :] == 0
    tile = tl.where(first, value.to(tl.float32)[:, None], 0.0).to(router.DOT)
    return total + _product(w.to(router.DOT), tile)


@triton.jit
def _of_token(total):
    """f32 [EXPERTS]: the column of `total` [EXPERTS, 16] that is the token's."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, total, 0.0), 1)


@triton.jit
def _in_order(parts, COUNT: tl.constexpr):
    """f32 [N]: the sum over the first axis of `parts` [COUNT, N], a power of 2, in order."""
    N: tl.constexpr = parts.shape[1]
    pieces = (tl.trans(parts),)
    for level in tl.static_range(COUNT.bit_length() - 1):
        # Of columns i, i + 2^level, i + 2 · 2^level, … the even and the odd ones.
        evens = ()
        odds = ()
        for i in tl.static_range(1 << level):
            even, odd = tl.split(tl.reshape(pieces[i], (N, COUNT >> (level + 1), 2)))
            evens = evens + (even,)
            odds = odds + (odd,)
        pieces = evens + odds
    total = tl.reshape(pieces[0], (N,))
    for i in tl.static_range(1, COUNT):
        total += tl.reshape(pieces[i], (N,))
    return total


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
    bias, correction = offsets(choice)
    choose(total, bias, correction, choice, token)


@triton.jit
def _choose_by_parts(
    logits, bias, correction, choice, token, tokens, STEP: tl.constexpr, PARTS: tl.constexpr
):
    """The choice of one token (i64), by logits that lie in PARTS parts [PARTS, tokens, E] to be
    summed in order; rows are STEP apart. `bias` and `correction` are the choice's `offsets`."""
    expert, present = experts_in_lanes(choice)
    total = tl.zeros([choice.GROUPS2 * choice.SIZE2], tl.float32)
    for part in tl.static_range(PARTS):
        row = logits + (token + part * tokens) * STEP
        held = tl.load(row + expert, mask=present, other=0, cache_modifier=".cg")
        total += held.to(tl.float32)
    choose(total, bias, correction, choice, token)


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
    ROWS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """partials f32 [PARTS, tokens, COUNT]: one token, sixteen experts, one chunk of the columns.

    Program (part · sixteens + sixteen) · tokens + token; those beyond do nothing. Where router,
    norms, bias and correction are constants (AHEAD) they are read before the launches before have
    ended. Then all of x and delta that a program needs is on its way before any of it is used: the
    token's row, unless it is long, whose norm every program takes for itself, and the chunk, which
    those of the first experts store as n and s. With `arrivals` [tokens] the last of a token makes
    its choice.
    """
    if AHEAD:
        pdl_launch(PROGRAMMATIC)
    else:
        pdl_wait(PROGRAMMATIC)
    K: tl.constexpr = router.WIDTH
    COUNT: tl.constexpr = router.COUNT
    BLOCKS: tl.constexpr = router.CHUNK // router.BLOCK
    SIXTEENS: tl.constexpr = (COUNT + 15) // 16
    HELD: tl.constexpr = K <= _HELD * ROW_BLOCK
    token = (tl.program_id(0) % tokens).to(tl.int64)
    sixteen = tl.program_id(0) // tokens % SIXTEENS
    part = tl.program_id(0) // tokens // SIXTEENS
    expert = sixteen * 16 + tl.arange(0, 16)
    present = (expert < COUNT) & (part < PARTS)
    column = tl.arange(0, BLOCKS)[:, None] * router.BLOCK + tl.arange(0, router.BLOCK)[None, :]
    at = part * router.CHUNK + column
    # The experts' rows [BLOCKS, 16, BLOCK], and what the token's is scaled by: one of ROWS, as
    # many as a matrix instruction takes, [ROWS, BLOCKS, BLOCK].
    mask = present[None, :, None] & (at < K)[:, None, :]
    w = tl.load(router.weight + expert[None, :, None] * K + at[:, None, :], mask=mask, other=0)
    live = (tl.arange(0, ROWS) == 0)[:, None, None] & (at < K)[None, :, :]
    at = tl.broadcast_to(at[None, :, :], (ROWS, BLOCKS, router.BLOCK))
    gain = gain_of(rows.norm, at, live)
    post_gain = gain_of(rows.post_norm, at, live)
    if HELD:
        gains = post_gains(rows, K, ROW_BLOCK)
    if arrivals is not None:
        bias, correction = offsets(choice)
    if AHEAD:
        pdl_join(PROGRAMMATIC)
    if part < PARTS:
        x, d = loaded(rows, token, at, live)
        if HELD:
            xs, ds = row_in_blocks(rows, token, K, ROW_BLOCK)
            post_scale, scale = scales_of_blocks(rows, xs, ds, gains, K, ROW_BLOCK)
        else:
            post_scale, scale = scales_of_row(rows, token, K, ROW_BLOCK)
        row = added(rows, x, d, post_gain, post_scale)
        value = row
        if rows.NORMED:
            value = row * scale * gain
        value = value.to(x.dtype)
        tile = tl.permute(value.to(router.DOT), (1, 2, 0))
        product = _product(w.to(router.DOT), tile)
        first = tl.arange(0, ROWS)[None, None, :] == 0
        total = _in_order(tl.sum(tl.where(first, product, 0.0), 2), BLOCKS)
        place = (part.to(tl.int64) * tokens + token) * COUNT + expert
        tl.store(partials + place, total, mask=present)
        if arrivals is not None:
            last = last_to_arrive(arrivals, token, PARTS * SIXTEENS)
        # Behind the arrival, which would wait for these stores.
        if sixteen == 0:
            if s is not None:
                tl.store(s + token * K + at, row.to(s.dtype.element_ty), mask=live)
            if n is not None:
                tl.store(n + token * K + at, value, mask=live)
        if arrivals is not None:  # noqa: SIM102 (a constant)
            if last:
                _choose_by_parts(partials, bias, correction, choice, token, tokens, COUNT, PARTS)


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
            part += _product(w.to(router.DOT), value)
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
    bias, correction = offsets(choice)
    _choose_by_parts(logits, bias, correction, choice, token, tokens, STEP, PARTS)
