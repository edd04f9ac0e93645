"""Serving: continuous batching over any driver.

`abi` (what entries take and give), `kv_cache` (pages and slots), `sampling` (one row on the host),
`sequence` (one request), `batch` (chunks and result rows of a step), `row_sampling` (next tokens by
the host or by the device), `speculation` (drafted tokens and their verification), `ngram` (drafts
from what a sequence has read before), `device_drafts` (of programs that draft themselves),
`adaptive` (how many drafted tokens pay), `draft_figures` (what drafting brought), `scheduler` (who
runs next: plan, ahead and commit), `steps` (launched before the tokens of others are known),
`turns` (what threads may do beside each other), `session` (continuous batching over all of these).
"""
