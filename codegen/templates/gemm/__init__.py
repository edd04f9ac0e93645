"""GEMMs: products by a weight, dense or MXFP4, for few tokens and for many.

`linear` multiplies by a weight, which `weight_tiles` reads (`mxfp4_decode` where it is packed); for
few tokens `fragment_linear` does where it lies as tensor cores take it, and `mfma_linear` on AMD;
`activations` are of gated units, `prologue` is what is done to the input first or within, and
`gemv` is for single rows.
"""
