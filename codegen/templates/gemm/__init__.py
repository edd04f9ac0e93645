"""GEMM and GEMV: products by a weight, dense or MXFP4, for few tokens and for many.

`linear` makes a `product` of a node and asks all kernels here:

- `tiled_linear`: any weight, any number of tokens;
- `dense_gemv`: a dense weight, very few tokens;
- `fragment_linear` and `mxfp4_stream` (its PTX: `stream_asm`): NVIDIA, MXFP4, few tokens;
- `head_stream`: the same, where every head has a weight of its own;
- `mfma_linear`: AMD, few tokens.

They share `weight` (how a weight is held and read; `mxfp4_decode` where it is packed), `prologue`
(what is done to the input first or within) and `epilogue` (what follows the sums; `activations` of
gated units). `gemv` is rows of a weight times one vector.
"""
