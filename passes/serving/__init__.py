"""How the model serves: `insert_kv_cache` (which asks `token_wise`), `gather_logits` and
`sample_on_device`.
"""
