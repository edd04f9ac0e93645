"""Graph to graph: one file a pass, named by its verb. Imports `compiler`.

Read `pipelines` first: it lists the passes in the order in which they run. The passes:
`canonicalize` (with the rules of `unit_dims`), `raise_ops` (with those of `raise_norms`,
`raise_rope`, `raise_routers`), `quantize_mxfp4` (whose weights `calibrate` may encode over a text),
`insert_kv_cache` (which asks `token_wise`),
`gather_logits`.
"""
