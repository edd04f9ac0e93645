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


@triton.jit
def scaled_numbers(words, scale, dtype: tl.constexpr):
    """Words i32 [...] of eight codes times `scale` f32 -> dtype [..., 2, 2, 2], by instructions.

    V_CVT_SCALEF32_PK_{F32,F16,BF16}_FP4 (AMD CDNA 4 ISA, VOP3): OPSEL[1:0] picks a byte of the
    first source; its low nibble makes the low half of the result, its high nibble the high half. Of
    the second source, an f32, only the exponent's eight bits count, as E8M0.
    """
    if dtype == tl.float32:
        a, b, c, d = tl.inline_asm_elementwise(
            """v_cvt_scalef32_pk_f32_fp4 $0, $4, $5
            v_cvt_scalef32_pk_f32_fp4 $1, $4, $5 op_sel:[1,0,0]
            v_cvt_scalef32_pk_f32_fp4 $2, $4, $5 op_sel:[0,1,0]
            v_cvt_scalef32_pk_f32_fp4 $3, $4, $5 op_sel:[1,1,0]""",
            "=&v,=&v,=&v,=&v,v,v",
            [words, scale],
            dtype=(tl.int64, tl.int64, tl.int64, tl.int64),
            is_pure=True,
            pack=1,
        )
    elif dtype == tl.float16:
        a, b, c, d = tl.inline_asm_elementwise(
            """v_cvt_scalef32_pk_f16_fp4 $0, $4, $5
            v_cvt_scalef32_pk_f16_fp4 $1, $4, $5 op_sel:[1,0,0]
            v_cvt_scalef32_pk_f16_fp4 $2, $4, $5 op_sel:[0,1,0]
            v_cvt_scalef32_pk_f16_fp4 $3, $4, $5 op_sel:[1,1,0]""",
            "=&v,=&v,=&v,=&v,v,v",
            [words, scale],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        tl.static_assert(dtype == tl.bfloat16)
        a, b, c, d = tl.inline_asm_elementwise(
            """v_cvt_scalef32_pk_bf16_fp4 $0, $4, $5
            v_cvt_scalef32_pk_bf16_fp4 $1, $4, $5 op_sel:[1,0,0]
            v_cvt_scalef32_pk_bf16_fp4 $2, $4, $5 op_sel:[0,1,0]
            v_cvt_scalef32_pk_bf16_fp4 $3, $4, $5 op_sel:[1,1,0]""",
            "=&v,=&v,=&v,=&v,v,v",
            [words, scale],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    # What is joined last changes fastest: bytes 0 … 3, and in each the low half, then the high.
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    if dtype == tl.float32:
        low, high = pairs.to(tl.int32), (pairs >> 32).to(tl.int32)
    else:
        low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
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
    return tl.reshape(scaled_numbers(grouped, e8m0(scales)[:, :, None], DTYPE), (ROWS, BLOCK))
