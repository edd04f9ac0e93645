"""MXFP4 to numbers inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e2m1(codes):
    """f32 of the low four bits of each element: sign, two bits of exponent, one of mantissa.

    Shifted to where f32 has them they are the number times 2^-126, subnormals too.
    """
    bits = codes.to(tl.uint32)
    bits = ((bits & 8) << 28) | ((bits & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e8m0(scales):
    """f32 of 2^(scale - 127); 255 is NaN."""
    exponent = scales.to(tl.uint32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    bits = tl.where(exponent == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decoded(codes, scales, ROWS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr):
    """f32 [ROWS, K] of codes u8 [ROWS, K/2] (low nibble first) and scales u8 [ROWS, K/GROUP]."""
    pair = tl.join(e2m1(codes), e2m1(codes >> 4))
    number = tl.reshape(pair, (ROWS, K // GROUP, GROUP)) * e8m0(scales)[:, :, None]
    return tl.reshape(number, (ROWS, K))
