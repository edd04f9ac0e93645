"""Triton kernels, one subject a file, each with the templates that choose it for a node.

A file holds `@triton.jit` functions and a table TEMPLATES: op name -> templates, which
`codegen.select` joins. Kernels load into f32, round once where the op's reference does, and mask
every edge: no size needs to be a multiple of a tile.

`linear` multiplies by a weight, which `weight_tiles` reads (`mxfp4_decode` where it is packed); for
few tokens `fragment_linear` does where it lies as tensor cores take it, and `mfma_linear` on AMD;
`activations` are of gated units, `prologue` is what is done to the input first or within, `heads`
what attention heads need after. `attend` holds the attention kernels and `attend_plan` their
launches, for `attention` (keys and values a head) and `mla` (latent rows). `gating` chooses experts
by `gating_kernels`, for which `row_norm` holds the norm and `choose` the choice; `experts` is
computed by `experts_few`, `experts_many` and `experts_sum`, with `gemv` for single rows. `norms`,
`rope`, `reductions` and `arithmetic` are the small ones. `rows` looks up and appends whole rows
(and finds a token's row of a cache for those that append their own), `sampling` chooses the next
tokens by what `drawing` does to a row, `copy` moves strided views, `generated` makes functions of
text. By `launching` each kernel takes its turn.
"""
