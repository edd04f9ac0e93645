"""The ops, one block each: type rule, reference, cost, samples, tolerance, registration.

`leaf` parameters, weights, literals · `pointwise` · `shape` · `reduce` · `linear` · `norm` · `rope`
· `glu` · `attention` · `mla` attention over a latent · `moe` · `mxfp4` packed weights, and in the
order of tensor cores `mxfp4_fragments` · `hadamard` · `collective` what ranks exchange ·
`sampling` the next token · `fused`
products with what surrounds them, `heads` of attention and `gating` of experts alike, `prologue`
what these share · `aten` any other functional torch operator.
"""

from . import (
    aten,
    attention,
    collective,
    fused,
    gating,
    glu,
    hadamard,
    heads,
    leaf,
    linear,
    mla,
    moe,
    mxfp4,
    mxfp4_fragments,
    norm,
    pointwise,
    reduce,
    rope,
    sampling,
    shape,
)

__all__ = [
    "aten",
    "attention",
    "collective",
    "fused",
    "gating",
    "glu",
    "hadamard",
    "heads",
    "leaf",
    "linear",
    "mla",
    "moe",
    "mxfp4",
    "mxfp4_fragments",
    "norm",
    "pointwise",
    "reduce",
    "rope",
    "sampling",
    "shape",
]
