"""The ops, one block each: type rule, reference, cost, samples, tolerance, registration.

`leaf` parameters, weights, literals · `pointwise` · `shape` · `reduce` · `linear` · `norm` · `rope`
· `glu` · `attention` · `moe` · `mxfp4` · `hadamard` · `aten` any other torch operator.
"""

from . import (
    aten,
    attention,
    glu,
    hadamard,
    leaf,
    linear,
    moe,
    mxfp4,
    norm,
    pointwise,
    reduce,
    rope,
    shape,
)

__all__ = [
    "aten",
    "attention",
    "glu",
    "hadamard",
    "leaf",
    "linear",
    "moe",
    "mxfp4",
    "norm",
    "pointwise",
    "reduce",
    "rope",
    "shape",
]
