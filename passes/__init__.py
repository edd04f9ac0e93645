"""Graph to graph: one file a pass, named by its verb. Imports `compiler`.

Read `pipelines` first: it lists the passes in the order in which they run; many build with `moves`
(views, slices and concatenations, also of packed weights). They are in five groups, a folder each:
`raising` (what the model says, cleaned), `transforms` (what it computes with: tensor parallelism,
absorbed MLA, MXFP4), `serving` (a paged KV cache, logits of wanted rows, sampling), `fusion` (what
one kernel computes) and `target` (what a GPU wants of the graph that it runs).
"""
