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
def loaded(rows, token, at, inside):
    """x and delta at the columns `at` of row `token` (i64), as they lie, 0 outside; x twice where
    there is no delta."""
    x = tl.load(rows.x + token * rows.STEP + at, mask=inside, other=0)
    d = x
    if rows.delta is not None:
        d = tl.load(rows.delta + token * rows.DELTA_STEP + at, mask=inside, other=0)
    return x, d


@triton.jit
def gain_of(weight, at, inside):
    """f32: a norm's weight at the columns `at`, or 1 where there is none; 0 outside."""
    if weight is not None:
        return tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    else:
        return inside.to(tl.float32)


@triton.jit
def added(rows, x, d, post_gain, post_scale):
    """s of what `loaded` gives, rounded to x's dtype, in f32."""
    s = x.to(tl.float32)
    if rows.delta is not None:
        d = d.to(tl.float32)
        if rows.post_norm is not None:
            d = d * post_scale * post_gain
        s = (s + d).to(x.dtype).to(tl.float32)
    return s


@triton.jit
def summed(rows, token, post_scale, at, inside):
    """s at the columns `at` of row `token` (i64), rounded to x's dtype, in f32; 0 outside."""
    x, d = loaded(rows, token, at, inside)
    return added(rows, x, d, gain_of(rows.post_norm, at, inside), post_scale)


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
def row_in_blocks(rows, token, K: tl.constexpr, BLOCK: tl.constexpr):
    """All of a row in registers: x and delta as `loaded` has them, each a tuple of [BLOCK]."""
    xs = ()
    ds = ()
    for i in tl.static_range((K + BLOCK - 1) // BLOCK):
        at = i * BLOCK + tl.arange(0, BLOCK)
        x, d = loaded(rows, token, at, at < K)
        xs = xs + (x,)
        ds = ds + (d,)
    return xs, ds


@triton.jit
def post_gains(rows, K: tl.constexpr, BLOCK: tl.constexpr):
    """The post-norm's weight as `gain_of` has it, a tuple of [BLOCK]."""
    gains = ()
    for i in tl.static_range((K + BLOCK - 1) // BLOCK):
        at = i * BLOCK + tl.arange(0, BLOCK)
        gains = gains + (gain_of(rows.post_norm, at, at < K),)
    return gains


@triton.jit
def scales_of_blocks(rows, xs, ds, gains, K: tl.constexpr, BLOCK: tl.constexpr):
    """scales_of_row, to the bit, of a row that lies in registers."""
    post_scale = 1.0
    if rows.post_norm is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range((K + BLOCK - 1) // BLOCK):
            d = ds[i].to(tl.float32)
            total += d * d
        post_scale = tl.rsqrt(tl.sum(total, 0) / K + rows.POST_EPS)
    scale = 1.0
    if rows.NORMED:
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range((K + BLOCK - 1) // BLOCK):
            s = added(rows, xs[i], ds[i], gains[i], post_scale)
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
