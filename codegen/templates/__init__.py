"""Triton kernels, one subject a file, each with the templates that choose it for a node.

A file holds `@triton.jit` functions and a table TEMPLATES: op name -> templates, which
`codegen.select` joins. Kernels load into f32, round once where the op's reference does, and mask
every edge: no size needs to be a multiple of a tile.

Folders: `gemm` (products by a weight), `attention`, `moe` (routers and experts), `rowwise` (norms,
reductions, lookups, copies) and `sampling`. Here: `pdl` (programmatic dependent launch), `arrival`
(the last program of a launch), `generated` (functions made of text) and `read_stream` (a memory's
read bandwidth).
"""
