"""How the model serves: `insert_kv_cache` (which asks `token_wise`), `gather_logits`,
`sample_on_device` and `feed_next_step`.
"""
