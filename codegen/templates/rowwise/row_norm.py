"""What products do to one row of their input first: compiler/ops/prologue.py as Triton helpers.

A row of K elements is read in blocks, so that its length meets no limit. Operands that are not
there are None.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def summed(x, delta, post_norm, post_scale, at, inside):
    """s at the columns `at`, rounded to x's dtype, in f32; 0 where not `inside`."""
    s = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if delta is not None:
        d = tl.load(delta + at, mask=inside, other=0).to(tl.float32)
        if post_norm is not None:
            d = d * post_scale * tl.load(post_norm + at, mask=inside, other=0).to(tl.float32)
        s = (s + d).to(x.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def scales_of_row(
    x,
    delta,
    norm,
    post_norm,
    EPS: tl.constexpr,
    POST_EPS: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / rms of delta and of s, each 1 where its norm is not there."""
    post_scale = 1.0
    if post_norm is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            at = start + tl.arange(0, BLOCK)
            d = tl.load(delta + at, mask=at < K, other=0).to(tl.float32)
            total += d * d
        post_scale = tl.rsqrt(tl.sum(total, 0) / K + POST_EPS)
    scale = 1.0
    if norm is not None:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            at = start + tl.arange(0, BLOCK)
            s = summed(x, delta, post_norm, post_scale, at, at < K)
            total += s * s
        scale = tl.rsqrt(tl.sum(total, 0) / K + EPS)
    return post_scale, scale


@triton.jit
def normed(s, norm, scale, at, inside, DTYPE: tl.constexpr):
    """n of s at the columns `at`, rounded to DTYPE."""
    n = s
    if norm is not None:
        n = s * scale * tl.load(norm + at, mask=inside, other=0).to(tl.float32)
    return n.to(DTYPE)
