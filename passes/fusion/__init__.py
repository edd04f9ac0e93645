"""What one kernel computes: operator fusion.

`fuse_shared_experts`, `fuse_mla_projections`, `fuse_qkv_rope`, `fuse_swiglu`, `fuse_moe_gating`,
`fuse_collective_norm`, `fuse_linear_residual`, `fuse_norm_linear`.
"""
