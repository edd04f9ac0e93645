"""MXFP4 in the canonical layout, turned into numbers inside kernels (compiler/microscaling.py).

codes u8 [..., K/2] hold element 2j in the low nibble of byte j; scales u8 [..., K/group] are E8M0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e2m1(nibble):
    """Codes i32 (the low four bits count) as f32, 2^126 times too small: exact subnormals.

    Exponent and mantissa at their place in an f32 are the number but for the bias.
    """
    return (((nibble & 7) << 22) | ((nibble & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0(byte):
    """Scales u8 as f32: 2^(byte - 127), of which 2^-127 is subnormal; NaN for 255."""
    wide = byte.to(tl.int32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23)
    return tl.where(wide == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def decoded(
    codes,
    scales,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """codes u8 [ROWS, BLOCK/2], scales u8 [ROWS, BLOCK/GROUP] -> numbers [ROWS, BLOCK].

    Exact in bf16 and f32; rounded once in f16. BLOCK is a multiple of GROUP.
    """
    wide = codes.to(tl.int32)
    both = tl.interleave(e2m1(wide), e2m1(wide >> 4))
    # In this order: a scale times 2^126 may leave the range of f32, an element does not.
    groups = tl.reshape(both * 8.507059173023462e37, (ROWS, BLOCK // GROUP, GROUP))
    return tl.reshape(groups * e8m0(scales)[:, :, None], (ROWS, BLOCK)).to(DTYPE)
