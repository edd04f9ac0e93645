"""The kernel by which a device's read bandwidth is measured."""

from __future__ import annotations

import triton
import triton.language as tl

from .pdl import pdl_wait


@triton.jit
def read_kernel(x, out, STEPS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMMATIC: tl.constexpr):
    """STEPS blocks of i32 a program; the sum is stored so that the loads are not left out."""
    pdl_wait(PROGRAMMATIC)
    start = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        total += tl.load(x + start + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))
