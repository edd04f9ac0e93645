"""Graph to graph: one file a pass, named by its verb. Imports `compiler`.

Read `pipelines` first: it lists the passes in the order in which they run. They are in four groups.

- What the model says, cleaned: `canonicalize` (with the rules of `unit_dims` and `mxfp4_views`) and
  `raise_ops` (with those of `raise_norms`, `raise_rope`, `raise_routers`).
- What it computes with: `shard_tensor_parallel` (by `shard_plan`, with `cuts` of values and
  `shares` of embeddings and experts), `absorb_mla` (with `premultiply_mla`; it reads `head_rows`)
  and `quantize_mxfp4` (whose weights `calibrate` may encode over a text).
- How it serves: `insert_kv_cache` (which asks `token_wise`), `gather_logits` and
  `sample_on_device`.
- What one kernel does: `fuse_shared_experts`, `fuse_mla_projections`, `fuse_qkv_rope`,
  `fuse_swiglu`, `fuse_moe_gating`, `fuse_collective_norm`, `fuse_linear_residual`,
  `fuse_norm_linear`. They share `weights` (concatenation) and `products` (which ops have a
  prologue).
"""
