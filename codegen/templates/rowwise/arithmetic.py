"""Arithmetic that tl lacks: an order of floats, powers, tanh, expm1, softplus, sine and cosine of
large angles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """f32 as i32 in the same order, -0 and 0 alike, NaN above all (as torch.topk has it)."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def float_of(key):
    """The f32 that `ordered` makes `key` (i32) of; 0 of -0, and one NaN of all."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """tanh(x) of floats; in f32 also right to the last bits near 0, where a difference is not."""
    result = 1 - 2 / (tl.exp(2 * x) + 1)
    if x.dtype != tl.float64:
        z = x * x
        series = x * (1 + z * (-1 / 3 + z * (2 / 15 + z * (-17 / 315 + z * (62 / 2835)))))
        result = tl.where(tl.abs(x) < 0.25, series, result)
    return result


@triton.jit
def expm1(x):
    """exp(x) - 1 of floats; in f32 also right to the last bits near 0, where it is a series."""
    result = tl.exp(x) - 1
    if x.dtype != tl.float64:
        tail = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880))))
        series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * tail))))
        result = tl.where(tl.abs(x) < 0.5, series, result)
    return result


@triton.jit
def softplus(x):
    """log(1 + exp(x)) of floats; in f32 right to the last bits, by the series of artanh."""
    e = tl.exp(-tl.abs(x))
    if x.dtype == tl.float64:
        more = tl.log(1 + e)
    else:
        # log(1 + e) == 2 artanh(z), and z is at most 1/3.
        z = tl.div_rn(e, 2 + e)
        s = z * z
        tail = 1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15)))
        more = 2 * z * (1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * tail))))
    return tl.maximum(x, 0.0) + more


@triton.jit
def float_power(x, y):
    """x ** y of one float type, through f64: right to the last bit or two of f32.

    A negative x has a power where y is whole, as in C.
    """
    a, b = x.to(tl.float64), y.to(tl.float64)
    whole = tl.floor(b) == b
    odd = whole & (tl.floor(b * 0.5) * 2 != b)
    size = tl.exp2(b * tl.log2(tl.abs(a)))
    size = tl.where((a < 0) & odd, -size, size)
    size = tl.where((a < 0) & (tl.abs(a) < float("inf")) & (whole == 0), float("nan"), size)
    size = tl.where((tl.abs(a) == 1) & (tl.abs(b) == float("inf")), 1.0, size)
    return tl.where((b == 0) | (a == 1), 1.0, size).to(x.dtype)


@triton.jit
def integer_power(x, y, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """x ** y of one integer type of BITS bits, which wraps around. A negative y gives 1 / x ** -y
    cut to an integer: 1, -1 or 0."""
    result = x * 0 + 1
    base = x
    left = y
    for _ in tl.static_range(BITS):
        result = tl.where((left & 1) == 1, result * base, result)
        base = base * base
        left = left >> 1
    if SIGNED:
        sign = tl.where((y & 1) == 1, x, x * 0 + 1)
        inverse = tl.where((x == 1) | (x == -1), sign, x * 0)
        result = tl.where(y < 0, inverse, result)
    return result


# Minimax polynomials of sin and cos on [-pi/4, pi/4] in f32 (Cephes, sinf.c).


@triton.jit
def cos_and_sin(angle):
    """cos and sin of an f32 or f64 `angle`, to an error of 1e-7, up to angles of 2**30.

    The angle is brought into [-pi/4, pi/4] in f64, where pi/2 is known to 53 bits.
    """
    exact = angle.to(tl.float64)
    turns = tl.floor(exact * 0.6366197723675814 + 0.5)
    r = (exact - turns * 1.5707963267948966).to(tl.float32)
    quarter = turns.to(tl.int64) & 3
    z = r * r
    s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    tail = 4.166664568298827e-2 + z * (z * 2.443315711809948e-5 - 1.388731625493765e-3)
    c = 1 - 0.5 * z + z * z * tail
    cos = tl.where((quarter & 1) == 1, s, c)
    sin = tl.where((quarter & 1) == 1, c, s)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = tl.where(quarter >= 2, -sin, sin)
    return cos, sin
