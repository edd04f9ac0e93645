"""Bytes a second that this GPU reads from its memory, at best; prints JSON.

A stream over 8 GiB that only reads, in several shapes of launch; the fastest median counts.
"""

from __future__ import annotations

import json
from statistics import median

import torch
import triton
import triton.language as tl

BYTES = 8 << 30
REPEATS = 20


@triton.jit
def read_kernel(x, out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """STEPS blocks of i32 a program; the sum is stored so that the loads are not left out."""
    start = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        total += tl.load(x + start + step * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def bytes_per_second() -> float:
    x = torch.randint(-(2**31), 2**31 - 1, (BYTES // 4,), dtype=torch.int32, device="cuda")
    out = torch.empty(1 << 20, dtype=torch.int32, device="cuda")
    best = 0.0
    for block in (2048, 4096, 8192):
        for steps in (4, 16, 64):
            grid = (BYTES // 4 // (block * steps),)
            times: list[float] = []
            for _ in range(REPEATS):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                read_kernel[grid](x, out, steps, block, num_warps=8)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            best = max(best, BYTES / (1e-3 * median(times)))
    return best


if __name__ == "__main__":
    print(json.dumps({"bytes_per_second": bytes_per_second()}))
