"""What is done to a row of a product's input first: compiler/ops/prologue.py as Triton helpers.

A row of K elements is read in blocks, so that its length meets no limit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class InputRows(NamedTuple):
    """s = x (+ delta, or + rms_norm(delta, post_norm)) and n = rms_norm(s, norm) where NORMED, else
    s, of rows STEP and DELTA_STEP elements apart. Operands that are not there are None."""

    x: Any
    delta: Any
    norm: Any
    post_norm: Any
    STEP: Any
    DELTA_STEP: Any
    NORMED: Any
    EPS: Any
    POST_EPS: Any


@triton.jit
def summed(rows, token, post_scale, at, inside):
    """s at the columns `at` of row `token` (i64), rounded to x's dtype, in f32; 0 outside."""
    s = tl.load(rows.x + token * rows.STEP + at, mask=inside, other=0).to(tl.float32)
    if rows.delta is not None:
        d = tl.load(rows.delta + token * rows.DELTA_STEP + at, mask=inside, other=0)
        d = d.to(tl.float32)
        if rows.post_norm is not None:
            gain = tl.load(rows.post_norm + at, mask=inside, other=0).to(tl.float32)
            d = d * post_scale * gain
        s = (s + d).to(rows.x.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def scales_of_row(rows, token, K: tl.constexpr, BLOCK: tl.constexpr):
    """1 / rms of delta and of s, each 1 where its norm is not there."""
    post_scale = 1.0
    if rows.post_norm is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            at = start + tl.arange(0, BLOCK)
            d = tl.load(rows.delta + token * rows.DELTA_STEP + at, mask=at < K, other=0)
            d = d.to(tl.float32)
            total += d * d
        post_scale = tl.rsqrt(tl.sum(total, 0) / K + rows.POST_EPS)
    scale = 1.0
    if rows.NORMED:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            at = start + tl.arange(0, BLOCK)
            s = summed(rows, token, post_scale, at, at < K)
            total += s * s
        scale = tl.rsqrt(tl.sum(total, 0) / K + rows.EPS)
    return post_scale, scale


@triton.jit
def normed(rows, s, scale, at, inside):
    """n of s at the columns `at`, rounded to x's dtype."""
    n = s
    if rows.NORMED:
        n = s * scale
        if rows.norm is not None:
            n = n * tl.load(rows.norm + at, mask=inside, other=0).to(tl.float32)
    return n.to(rows.x.dtype.element_ty)


@triton.jit
def store_row(
    rows, token, post_scale, scale, n, s, first, stop, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Columns `first` to `stop` of n and s [T, K], each None where it is not wanted."""
    for start in range(first, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < K
        value = summed(rows, token, post_scale, at, inside)
        if s is not None:
            tl.store(s + token * K + at, value.to(s.dtype.element_ty), mask=inside)
        if n is not None:
            tl.store(n + token * K + at, normed(rows, value, scale, at, inside), mask=inside)
