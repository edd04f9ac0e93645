"""What the model says, cleaned and in the IR's own ops.

`canonicalize` (with the rules of `unit_dims`, `equal_slices` and `mxfp4_views`), then `raise_ops`
(with those of `raise_norms`, `raise_rope`, `raise_routers`).
"""
