"""How the model serves: `insert_kv_cache` (which asks `token_wise`), `gather_logits`,
`sample_on_device`, `draft_next_tokens` and `feed_next_step`.
"""
