"""Attention over a paged KV cache, and what heads need before it.

`attend` holds the kernel for whole contexts, `decode` that for parts of contexts (flash decoding),
`decode_registers` that of one token on NVIDIA, `parts` what joins them, and `attend_plan` the
launches of all, for `grouped_query` (keys and values a head) and `mla` (latent rows). `heads` norms
and rotates the heads of a q‖k‖v product; `heads_within` does where they attend, which
`project_attention` chooses; `latent_rows` makes the rows of a latent, by a launch of their own or
where they attend, which `latent_attention` chooses. `composed` puts launches of several ops
together; `rope` is the rotary embedding alone.
"""
