"""Serving: continuous batching over any driver.

`abi` (what entries take and give), `kv_cache` (pages and slots), `sampling` (one row on the host),
`sequence` (one request), `row_sampling` (next tokens, by the host or by the device), `scheduler`
(who runs next), `session` (continuous batching over all of these).
"""
