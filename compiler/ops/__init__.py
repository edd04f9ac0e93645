"""The ops, one block each: type rule, reference, cost, samples, tolerance, registration.

`leaf` parameters, weights, literals · `pointwise` · `shape` · `reduce` · `linear` · `norm` · `rope`
· `glu` · `attention` · `moe` · `mxfp4` · `collective` what ranks exchange · `aten` any other
functional torch operator.
"""

from . import (
    aten,
    attention,
    collective,
    glu,
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
    "collective",
    "glu",
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
