"""Triton kernels, one subject a file, each with the templates that choose it for a node.

A file holds `@triton.jit` functions and a table TEMPLATES: op name -> templates, which
`codegen.select` joins. Kernels load into f32, round once where the op's reference does, and mask
every edge: no size needs to be a multiple of a tile.

`rows` looks up and appends whole rows, `copy` moves strided views, `generated` makes functions of
text. `attend` holds the attention kernels and `attend_plan` their launches, for `attention` (keys and
values a head) and `mla` (latent rows).
"""
