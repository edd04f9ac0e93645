"""What the target wants of the final graph, after all that holds for every target.

`lay_out_weights` packed weights in the order of tensor cores, `fuse_kv_append` rows written into
the cache where they are made, `fuse_heads_attention` heads made where they attend,
`fuse_elementwise` regions of element-wise ops.
"""
