"""Kernels of a mixture's gate: a row's norm, the router's product, and the choice.

However many tokens there are, K is summed in chunks of CHUNK columns, BLOCK at a time, and chunks
in order: in one program or, where tokens are few, each in one of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..pdl import pdl_wait
from ..rowwise.row_norm import normed, scales_of_row, summed
from .choose import choose, expert_of


@triton.jit
def norm_rows_kernel(
    x,
    delta,
    norm,
    post_norm,
    n,
    s,
    EPS: tl.constexpr,
    POST_EPS: tl.constexpr,
    STEP: tl.constexpr,
    DELTA_STEP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """n and s [T, K] of a token; each is None where it is not wanted."""
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    x += token * STEP
    if delta is not None:
        delta += token * DELTA_STEP
    post_scale, scale = scales_of_row(x, delta, norm, post_norm, EPS, POST_EPS, K, BLOCK)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = summed(x, delta, post_norm, post_scale, at, at < K)
        if s is not None:
            tl.store(s + token * K + at, value.to(s.dtype.element_ty), mask=at < K)
        if n is not None:
            value = normed(value, norm, scale, at, at < K, x.dtype.element_ty)
            tl.store(n + token * K + at, value, mask=at < K)


@triton.jit
def token_logits(
    x,
    delta,
    norm,
    post_norm,
    post_scale,
    scale,
    n,
    s,
    weight,
    expert,
    present,
    first,
    DOT: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """f32 [EXPERTS]: one token's products with the experts' rows over columns first … first +
    CHUNK, in DOT; stores n and s there, if they are given.

    The token is one column of sixteen, which is what a matrix instruction takes.
    """
    column = tl.arange(0, 16)
    total = tl.zeros([EXPERTS, 16], tl.float32)
    for start in range(first, first + CHUNK, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < K
        added = summed(x, delta, post_norm, post_scale, at, inside)
        if s is not None:
            tl.store(s + at, added.to(s.dtype.element_ty), mask=inside)
        value = normed(added, norm, scale, at, inside, x.dtype.element_ty)
        if n is not None:
            tl.store(n + at, value, mask=inside)
        tile = tl.where(column[None, :] == 0, value.to(tl.float32)[:, None], 0.0).to(DOT)
        mask = present[:, None] & inside[None, :]
        w = tl.load(weight + expert[:, None] * K + at[None, :], mask=mask, other=0).to(DOT)
        total = tl.dot(w, tile, total, input_precision="ieee")
    return tl.sum(tl.where(column[None, :] == 0, total, 0.0), 1)


@triton.jit
def rounded(total, bias, expert, present, LOGITS: tl.constexpr):
    """Logits f32 of sums f32: bias, of dtype LOGITS, added, and rounded once to LOGITS."""
    if bias is not None:
        total += tl.load(bias + expert, mask=present, other=0).to(LOGITS).to(tl.float32)
    return total.to(LOGITS).to(tl.float32)


@triton.jit
def gate_kernel(
    x,
    delta,
    norm,
    post_norm,
    weight,
    bias,
    correction,
    n,
    s,
    weights,
    indices,
    EPS: tl.constexpr,
    POST_EPS: tl.constexpr,
    STEP: tl.constexpr,
    DELTA_STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    LOGITS: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS2: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE2: tl.constexpr,
    TOP: tl.constexpr,
    TOP2: tl.constexpr,
    SCALE: tl.constexpr,
    SUM_EPS: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """The whole gate of one token."""
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    x += token * STEP
    if delta is not None:
        delta += token * DELTA_STEP
    if n is not None:
        n += token * WIDTH
    if s is not None:
        s += token * WIDTH
    post_scale, scale = scales_of_row(x, delta, norm, post_norm, EPS, POST_EPS, WIDTH, ROW_BLOCK)
    expert, present = expert_of(tl.arange(0, GROUPS2 * SIZE2), GROUPS, SIZE, SIZE2)
    total = tl.zeros([GROUPS2 * SIZE2], tl.float32)
    for first in range(0, WIDTH, CHUNK):
        total += token_logits(
            x, delta, norm, post_norm, post_scale, scale, n, s, weight, expert, present, first,
            DOT, WIDTH, GROUPS2 * SIZE2, CHUNK, BLOCK,
        )  # fmt: skip
    choose(
        rounded(total, bias, expert, present, LOGITS), correction,
        weights + token * (K + SHARED), indices + token * (K + SHARED),
        K, SIGMOID, NORMALIZE, GROUPS, GROUPS2, SIZE, SIZE2, TOP, TOP2, SCALE, SUM_EPS, SHARED,
        COLUMNS,
    )  # fmt: skip


@triton.jit
def token_partials_kernel(
    x,
    delta,
    norm,
    post_norm,
    weight,
    n,
    s,
    partials,
    tokens,
    EPS: tl.constexpr,
    POST_EPS: tl.constexpr,
    STEP: tl.constexpr,
    DELTA_STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """partials f32 [chunks, tokens, COUNT]: one token, sixteen experts, one chunk of the columns.

    Every program takes the norm of its token for itself; those of the first experts store n and s.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    x += token * STEP
    if delta is not None:
        delta += token * DELTA_STEP
    post_scale, scale = scales_of_row(x, delta, norm, post_norm, EPS, POST_EPS, WIDTH, ROW_BLOCK)
    first = tl.program_id(2) * CHUNK
    expert = tl.program_id(1) * 16 + tl.arange(0, 16)
    total = token_logits(
        x, delta, norm, post_norm, post_scale, scale, None, None, weight, expert, expert < COUNT,
        first, DOT, WIDTH, 16, CHUNK, BLOCK,
    )  # fmt: skip
    at = (tl.program_id(2).to(tl.int64) * tokens + token) * COUNT + expert
    tl.store(partials + at, total, mask=expert < COUNT)
    if tl.program_id(1) == 0:
        for start in range(first, first + CHUNK, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            value = summed(x, delta, post_norm, post_scale, column, inside)
            if s is not None:
                out = s + token * WIDTH + column
                tl.store(out, value.to(s.dtype.element_ty), mask=inside)
            if n is not None:
                rounded_n = normed(value, norm, scale, column, inside, x.dtype.element_ty)
                tl.store(n + token * WIDTH + column, rounded_n, mask=inside)


@triton.jit
def tile_logits_kernel(
    x,
    weight,
    logits,
    tokens,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    DOT: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """logits f32 [tokens, COUNT], not yet rounded: TOKENS tokens by sixteen experts."""
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    row = x + token.to(tl.int64) * STEP
    expert = tl.program_id(1) * 16 + tl.arange(0, 16)
    present = expert < COUNT
    total = tl.zeros([16, TOKENS], tl.float32)
    for first in range(0, WIDTH, CHUNK):
        part = tl.zeros([16, TOKENS], tl.float32)
        for start in range(first, first + CHUNK, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < WIDTH
            mask = inside[:, None] & live[None, :]
            value = tl.load(row[None, :] + at[:, None], mask=mask, other=0).to(DOT)
            mask = present[:, None] & inside[None, :]
            w = tl.load(weight + expert[:, None] * WIDTH + at[None, :], mask=mask, other=0)
            part = tl.dot(w.to(DOT), value, part, input_precision="ieee")
        total += part
    at = logits + token[None, :].to(tl.int64) * COUNT + expert[:, None]
    tl.store(at, total, mask=present[:, None] & live[None, :])


@triton.jit
def choose_kernel(
    logits,
    bias,
    correction,
    weights,
    indices,
    tokens,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    LOGITS: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS2: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE2: tl.constexpr,
    TOP: tl.constexpr,
    TOP2: tl.constexpr,
    SCALE: tl.constexpr,
    SUM_EPS: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """The choice of one token, by logits that lie in PARTS parts [PARTS, tokens, E] to be summed in
    order; rows are STEP apart."""
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    expert, present = expert_of(tl.arange(0, GROUPS2 * SIZE2), GROUPS, SIZE, SIZE2)
    total = tl.zeros([GROUPS2 * SIZE2], tl.float32)
    for part in tl.static_range(PARTS):
        row = logits + (token + part * tokens) * STEP
        total += tl.load(row + expert, mask=present, other=0).to(tl.float32)
    choose(
        rounded(total, bias, expert, present, LOGITS), correction,
        weights + token * (K + SHARED), indices + token * (K + SHARED),
        K, SIGMOID, NORMALIZE, GROUPS, GROUPS2, SIZE, SIZE2, TOP, TOP2, SCALE, SUM_EPS, SHARED,
        COLUMNS,
    )  # fmt: skip
