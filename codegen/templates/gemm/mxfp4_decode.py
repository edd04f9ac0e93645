"""MXFP4 in the canonical layout, turned into numbers inside kernels (compiler/microscaling.py).

codes u8 [..., K/2] hold element 2j in the low nibble of byte j; scales u8 [..., K/group] are E8M0.
Codes become numbers by moving their bits, or, where the target has them, by scaled conversions.
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
    return narrowed(tl.reshape(groups * e8m0(scales)[:, :, None], (ROWS, BLOCK)), DTYPE)


@triton.jit
def narrowed(number, dtype: tl.constexpr):
    """f32 numbers that bf16 holds exactly in `dtype`: nothing is rounded to bf16, but cut."""
    if dtype == tl.bfloat16:
        bits = number.to(tl.int32, bitcast=True) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return number.to(dtype)


def _conversions(to: str) -> str:
    """Four words and their scales, operands 16 to 23, to sixteen pairs, operands 0 to 15.

    V_CVT_SCALEF32_PK_{F32,F16,BF16}_FP4 (AMD CDNA 4 ISA, VOP3): OPSEL[1:0] picks a byte of the
    first source; its low nibble makes the low half of the result, its high nibble the high half. Of
    the second source, an f32, only the exponent's eight bits count, as E8M0.

    Around inline assembly LLVM inserts no wait states. A vector instruction may write what an MFMA
    adds to up to 15 of them later, and an MFMA may read what it wrote 2 later.
    """
    lines = ["s_nop 15"]
    for pair in range(16):
        word, byte = divmod(pair, 4)
        select = f" op_sel:[{byte & 1},{byte >> 1},0]" if byte else ""
        operands = f"${pair}, ${16 + word}, ${20 + word}"
        lines.append(f"v_cvt_scalef32_pk_{to}_fp4 {operands}{select}")
    return "\n\t".join([*lines, "s_nop 1"])


_TO_F32 = tl.constexpr(_conversions("f32"))
_TO_F16 = tl.constexpr(_conversions("f16"))
_TO_BF16 = tl.constexpr(_conversions("bf16"))
_CONSTRAINTS = tl.constexpr(",".join(["=&v"] * 16 + ["v"] * 8))


@triton.jit
def scaled_numbers(words, scale, dtype: tl.constexpr):
    """Words i32 [..., 2, 2] of eight codes, times `scale` f32 of that shape, by instructions ->
    dtype [..., 2, 2, 2, 2, 2]. Four words should lie in one thread."""
    even, odd = tl.split(words)
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    even, odd = tl.split(scale)
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    wide: tl.constexpr = dtype == tl.float32
    tl.static_assert(wide or dtype == tl.bfloat16 or dtype == tl.float16)
    to_narrow: tl.constexpr = _TO_BF16 if dtype == tl.bfloat16 else _TO_F16
    a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3 = tl.inline_asm_elementwise(
        _TO_F32 if wide else to_narrow,
        _CONSTRAINTS,
        [w0, w1, w2, w3, s0, s1, s2, s3],
        dtype=(tl.int64 if wide else tl.int32,) * 16,
        is_pure=True,
        pack=1,
    )
    # What is joined last changes fastest: words, in them bytes, in those the low half, the high.
    a = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    b = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    c = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    d = tl.join(tl.join(d0, d2), tl.join(d1, d3))
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    half: tl.constexpr = tl.int32 if wide else tl.int16
    low, high = pairs.to(half), (pairs >> (32 if wide else 16)).to(half)
    return tl.join(low.to(dtype, bitcast=True), high.to(dtype, bitcast=True))


@triton.jit
def scaled_tile(
    words,
    scales,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """As `decoded` by scaled conversions: words i32 [ROWS, BLOCK/8] of codes instead of bytes."""
    grouped = tl.reshape(words, (ROWS, BLOCK // GROUP, GROUP // 8))
    grouped, scale = tl.broadcast(grouped, e8m0(scales)[:, :, None])
    grouped = tl.reshape(grouped, (ROWS, BLOCK // 32, 2, 2))
    scale = tl.reshape(scale, (ROWS, BLOCK // 32, 2, 2))
    return tl.reshape(scaled_numbers(grouped, scale, DTYPE), (ROWS, BLOCK))
