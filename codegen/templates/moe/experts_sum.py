"""The last step of a mixture of experts: a token's parts, weighed and added in order."""

from __future__ import annotations

import triton
import triton.language as tl

from ..pdl import pdl_wait


@triton.jit
def combine_kernel(
    parts,
    weights,
    residual,
    out,
    K: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):
    """out [T, WIDTH] = sum over j of weights[t, j] · parts[t·K + j] + residual[t], in f32.

    A program computes BLOCK columns of one token; residual's rows are STEP apart.
    """
    pdl_wait(PROGRAMMATIC)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        choice = token * K + j
        part = tl.load(parts + choice * WIDTH + at, mask=inside, other=0).to(tl.float32)
        total += part * tl.load(weights + choice).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + token * STEP + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * WIDTH + at, total.to(out.dtype.element_ty), mask=inside)
