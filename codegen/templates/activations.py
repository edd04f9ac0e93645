"""The activations of gated units, in f32 (see compiler.ops.glu)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def activated(x, KIND: tl.constexpr):
    """The activation called KIND."""
    if KIND == "silu":
        y = x * sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "relu":
        y = tl.maximum(x, 0.0)
    elif KIND == "sigmoid":
        y = sigmoid(x)
    else:
        tl.static_assert(KIND == "tanh", "unknown activation")
        y = tanh(x)
    return y


@triton.jit
def gated(gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """activation(gate) · up; clamped_swiglu clamps both and adds one to `up` first."""
    if KIND == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        y = gate * sigmoid(ALPHA * gate) * (up + 1)
    else:
        y = activated(gate, KIND) * up
    return y
