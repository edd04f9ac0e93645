"""Serving: continuous batching over any driver.

`buckets` (what entries take and give), `kv_cache` (pages and slots), `sampling`, `sequence` (one
request), `choosing` (next tokens, by the host or by the device), `scheduler` (who runs next),
`session` (continuous batching over all of these).
"""
