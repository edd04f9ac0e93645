"""The replay of a program. Imports nothing of ours; torch only in `cpu` and in `collectives`, which
moves its tensors between processes; triton nowhere.

Read in this order: `program` (the contract with codegen; standard library only), `driver` (what a
device must do), `cpu` (the driver that runs the references), `collectives` (ranks that exchange
tensors), `buckets` (what entries take and give), `kv_cache` (pages and slots), `sampling`,
`sequence` (one request), `choosing` (next tokens, by the host or by the device), `scheduler` (who
runs next), `session` (continuous batching over all of these).
"""
