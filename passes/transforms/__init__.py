"""What the model computes with: ranks, latent attention, packed weights.

`shard_tensor_parallel` (by `shard_plan`, with `propagate_slice` and `shares` of embeddings and
experts), `absorb_mla` (with `premultiply_mla`) and `quantize_mxfp4` (by the
policy in `mxfp4_policy`; `calibrate` may encode the weights over a text).
"""
