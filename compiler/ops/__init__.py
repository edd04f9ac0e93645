"""The ops, one block each: type rule, reference, cost, samples, tolerance, registration.

`leaf` parameters, weights, literals · `pointwise` · `shape` · `reduce` · `linear` · `norm` · `rope`
· `glu` · `attention` · `moe` · `mxfp4` · `prologue` what fused products do to their input · `aten`
any other functional torch operator.
"""

from . import aten, attention, glu, leaf, linear, moe, mxfp4, norm, pointwise, reduce, rope, shape

__all__ = [
    "aten",
    "attention",
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
