"""The ops, one block each: type rule, reference, cost, samples, tolerance, registration.

`leaf` parameters, weights, literals · `pointwise` · `shape` · `reduce` · `linear` · `norm` · `rope`
· `glu` · `attention` · `heads` · `moe` · `gating` · `prologue` what fused products do to their
input · `aten` any other functional torch operator.
"""

from . import (
    aten,
    attention,
    gating,
    glu,
    heads,
    leaf,
    linear,
    moe,
    norm,
    pointwise,
    reduce,
    rope,
    shape,
)

__all__ = [
    "aten",
    "attention",
    "gating",
    "glu",
    "heads",
    "leaf",
    "linear",
    "moe",
    "norm",
    "pointwise",
    "reduce",
    "rope",
    "shape",
]
