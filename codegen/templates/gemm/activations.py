"""Activations and gated units as Triton helpers: compiler/ops/glu.py in f32, not yet rounded.

`ACTIVATION` is the op's attribute. tanh is written through exp, which is exact at both ends.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh of f32: 1 where exp overflows, -1 where it vanishes."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """f32 -> f32, any shape; all activations of glu.py but clamped_swiglu, which takes two."""
    if ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "tanh", "activated: unknown activation")
        y = tanh(x)
    return y


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, alpha, limit):
    """activation(gate) · up in f32; `alpha` and `limit` are clamped_swiglu's.

    Where an operand of clamped_swiglu is NaN, so is the result.
    """
    if ACTIVATION == "clamped_swiglu":
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        y = gate / (1 + tl.exp(-alpha * gate)) * (up + 1)
    else:
        y = activated(gate, ACTIVATION) * up
    return y
