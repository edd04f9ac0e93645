"""Attention over a paged KV cache, and what heads need before it.

`attend` holds the attention kernels and `attend_plan` their launches, for `grouped_query` (keys and
values a head) and `mla` (latent rows). `heads` norms and rotates the heads of a q‖k‖v product,
`project_attention` does where they attend; `rope` is the rotary embedding alone.
"""
