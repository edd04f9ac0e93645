"""From the final graph to the program. Imports `compiler` and `runtime`.

For the cpu target that is the graph itself, which `cpu` interprets. For a GPU it is a static plan.

Read `lower` first (graph to `Program`: one entry a bucket), then `entries` (the walk over the graph
for one bucket), `memory` (lifetimes, donation, places in the arena) and `constants` (what weights
become when they are loaded). `kernel_backend` turns nodes into launches. It asks `templates` (a
folder: Triton kernels) by way of `select` in the terms of `kernel_query`, and takes the cheapest by
`prices`, which come from a `price_table` where they were measured; what a template names is a
`kernel_source`, and `build` compiles it. Element-wise ops need no template: `pointwise` generates
the kernel of one, or of a region, out of their `expressions`.
"""
