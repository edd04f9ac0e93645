"""The ops, one block each: type rule, reference, cost, samples, tolerance, registration.

`leaf` parameters, weights, literals · `pointwise` · `shape` · `reduce` · `linear` · `norm` · `rope`
· `glu` · `attention` · `mla` · `moe` · `mxfp4` · `aten` any other functional torch operator.
"""

from . import (
    aten,
    attention,
    glu,
    leaf,
    linear,
    mla,
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
    "leaf",
    "linear",
    "mla",
    "moe",
    "mxfp4",
    "norm",
    "pointwise",
    "reduce",
    "rope",
    "shape",
]
