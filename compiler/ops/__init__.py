"""The ops, one block each: type rule, reference, cost, samples, tolerance, registration.

`leaf` parameters, weights, literals · `pointwise` · `shape` · `reduce` · `linear` · `norm` · `rope`
· `glu` · `attention` · `mla` attention over a latent · `moe` · `mxfp4` packed weights, and in the
order of tensor cores `mxfp4_fragments` · `hadamard` · `collective` what ranks exchange ·
`sampling` the next token, `feed` what the next step takes of it, and `draft` what drafting does ·
`heads` of attention and `gating` of experts with their product, `project_attention` both heads and
attention, `latent_attention` rows of a latent and attention, `prologue` what these and `linear`
share · `region` element-wise ops as one node · `aten` any other functional torch operator.
"""

from importlib import import_module
from pkgutil import iter_modules

# Every op is registered, so that any text can be read.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
